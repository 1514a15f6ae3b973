"""Read json and jsonl files value by value, also where one array fills the whole file."""

import json
import re
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TextIO

from yrunner.data.readers.text import Advance, Damaged, FileRow, open_text
from yrunner.errors import DataError, Origin

CHARACTERS_AT_ONCE = 1 << 20
# Longer than what can be cut in two: the end of a number (1e+), a pair of \u escapes, -Infinity.
MARGIN = 16
BLANKS = re.compile(r"[ \t\n\r]*")

# Python refuses numbers of over 4,300 digits with a plain ValueError.
JSON_ERRORS = (ValueError, RecursionError)


def read_jsonl(path: Path, advance: Advance | None = None) -> Iterator[FileRow]:
    """Yield the value of each line that is not blank, a broken one as `Damaged`."""
    parser = _Parser()
    with open_text(path, advance=advance) as lines:
        for number, line in enumerate(lines, start=1):
            if line := line.rstrip():
                yield Origin(path, number), parser.line(line)


def read_json(path: Path, advance: Advance | None = None) -> Iterator[FileRow]:
    """Yield each item of the array that the file holds, or the one value that it is."""
    with open_text(path, advance=advance) as text:
        for number, value in enumerate(_Document(path, text).values(), start=1):
            yield Origin(path, number), value


class _Parser:
    """Decodes JSON values.

    One with an object in which a key stands twice is `Damaged`: Python itself would silently keep
    the last of the two.
    """

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self._twice: str | None = None

    def line(self, line: str) -> Any:
        """The one value of a line, `Damaged` where it is no JSON."""
        self._twice = None
        try:
            return self._checked(self._decoder.decode(line))
        except JSON_ERRORS as error:
            return Damaged(_fault(error))

    def value(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at `start`, and where it ends; raises one of JSON_ERRORS."""
        self._twice = None
        value, end = self._decoder.raw_decode(text, start)
        return self._checked(value), end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            self._twice = next(name for name in names if names.count(name) > 1)
        return row

    def _checked(self, value: Any) -> Any:
        if self._twice is None:
            return value
        return Damaged(f'the key "{self._twice}" stands twice in one object')


class _Document:
    """A json file that is read as far as its next value needs: `text` from `at` on is unread."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path = path
        self.file = file
        self.parser = _Parser()
        self.text = ""
        self.at = 0
        self.whole = False
        # Line ends before `text`, and characters behind the last of them.
        self.lines_before = self.columns_before = 0

    def values(self) -> Iterator[Any]:
        """Each item of an array, or the one value; raises `DataError` where neither stands here."""
        match self.next_sign():
            case "":
                return
            case "[":
                yield from self.items()
            case _:
                yield self.value()
        if self.next_sign():
            raise self.error(JSONDecodeError("Extra data", self.text, self.at))

    def items(self) -> Iterator[Any]:
        self.at += 1
        sign = self.next_sign()
        while sign != "]":
            yield self.value()
            sign = self.next_sign()
            if sign == ",":
                self.at += 1
                # Here a bracket is no end but a fault, which value() finds.
                self.next_sign()
            elif sign != "]":
                raise self.error(JSONDecodeError("Expecting ',' delimiter", self.text, self.at))
        self.at += 1

    def next_sign(self) -> str:
        """Step over blanks; the character there, empty at the end of the file."""
        while True:
            blanks = BLANKS.match(self.text, self.at)
            assert blanks is not None, "no blank is a match too"
            self.at = blanks.end()
            if self.at < len(self.text) or self.whole:
                return self.text[self.at : self.at + 1]
            self.read_more()

    def value(self) -> Any:
        """The value that begins here, however much must be read for it."""
        while True:
            try:
                value, end = self.parser.value(self.text, self.at)
            except JSONDecodeError as error:
                cut = error.pos + MARGIN > len(self.text) or error.msg.startswith("Unterminated")
                if self.whole or not cut:
                    raise self.error(error) from error
            except JSON_ERRORS as error:
                raise self.error(error) from error
            else:
                if self.whole or end + MARGIN <= len(self.text):
                    self.at = end
                    return value
            self.read_more()

    def read_more(self) -> None:
        """Drop what is read and read on, twice as far each time the same value needs more."""
        read, unread = self.text[: self.at], self.text[self.at :]
        self.lines_before += read.count("\n")
        self.columns_before = self.columns_of(read)
        more = self.file.read(max(CHARACTERS_AT_ONCE, len(unread)))
        self.whole = not more
        self.text, self.at = unread + more, 0

    def columns_of(self, read: str) -> int:
        """Characters of the last line of the file, once `read` is dropped from `text`."""
        line_end = read.rfind("\n")
        return len(read) + self.columns_before if line_end < 0 else len(read) - line_end - 1

    def error(self, error: ValueError | RecursionError) -> DataError:
        """The sentence about a fault in `text`, with its place in the file."""
        if isinstance(error, JSONDecodeError):
            line = self.lines_before + error.lineno
            column = self.columns_of(self.text[: error.pos]) + 1
            reason = f"not JSON: {error.msg} at line {line} column {column}"
        else:
            reason = _fault(error)
        return DataError(
            self.path,
            reason,
            remedy="mend it there, or name the file .jsonl if it has one object a line",
        )


def _fault(error: ValueError | RecursionError) -> str:
    """What is wrong with a value, and where in it, as far as the parser says so."""
    match error:
        case JSONDecodeError():
            return f"not JSON: {error.msg} at column {error.colno}"
        case RecursionError():
            return "its lists and objects are nested too deeply"
        case _:
            return "holds a number with too many digits"
