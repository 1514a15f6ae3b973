"""Read json and jsonl files one value at a time, even a file that is a single array."""

import json
import re
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TextIO

from yrunner.data.readers.text import Advance, Damaged, FileRow, open_text
from yrunner.errors import DataError, Origin

CHARACTERS_AT_ONCE = 1 << 20
# Longer than any token that more text could change: a number (1e+), two \u escapes, -Infinity.
MARGIN = 16
BLANKS = re.compile(r"[ \t\n\r]*")

# Python refuses numbers of over 4,300 digits with a plain ValueError.
JSON_ERRORS = (ValueError, RecursionError)


def read_jsonl(path: Path, advance: Advance | None = None) -> Iterator[FileRow]:
    """Yield the value of each line that is not blank; an invalid line as `Damaged`."""
    parser = _Parser()
    with open_text(path, advance=advance) as lines:
        for number, line in enumerate(lines, start=1):
            if line := line.rstrip():
                yield Origin(path, number), parser.line(line)


def read_json(path: Path, advance: Advance | None = None) -> Iterator[FileRow]:
    """Yield each item of the array in the file, or its one value."""
    with open_text(path, advance=advance) as text:
        for number, value in enumerate(Document(path, text).values(), start=1):
            yield Origin(path, number), value


class _Parser:
    """Decodes JSON values; one with a duplicate key is `Damaged`.

    Python would silently keep the last value of the key.
    """

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self._duplicate: str | None = None

    def line(self, line: str) -> Any:
        """The value of a line, `Damaged` if the line is not valid JSON."""
        self._duplicate = None
        try:
            return self._checked(self._decoder.decode(line))
        except JSON_ERRORS as error:
            return Damaged(_fault(error))

    def value(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at `start`, and its end. Raises one of JSON_ERRORS."""
        self._duplicate = None
        value, end = self._decoder.raw_decode(text, start)
        return self._checked(value), end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            self._duplicate = next(name for name in names if names.count(name) > 1)
        return row

    def _checked(self, value: Any) -> Any:
        if self._duplicate is None:
            return value
        return Damaged(f'duplicate key "{self._duplicate}" in an object')


class Document:
    """A JSON file, read only as far as its next value needs; `text[at:]` is not parsed yet."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path = path
        self.file = file
        self.parser = _Parser()
        self.text = ""
        self.at = 0
        self.whole = False
        # Of the last value, in characters of the file.
        self.value_start = self.value_end = 0
        self.characters_before = 0
        # Line ends before `text`, and characters after the last of them.
        self.lines_before = self.columns_before = 0

    def values(self) -> Iterator[Any]:
        """Each item of an array, or the one value. Raises `DataError` for invalid JSON."""
        match self.next_character():
            case "":
                return
            case "[":
                yield from self.items()
            case _:
                yield self.value()
        if self.next_character():
            raise self.error(JSONDecodeError("Extra data", self.text, self.at))

    def items(self) -> Iterator[Any]:
        self.at += 1
        character = self.next_character()
        while character != "]":
            yield self.value()
            character = self.next_character()
            if character == ",":
                self.at += 1
                # A bracket here is a trailing comma, which value() refuses.
                self.next_character()
            elif character != "]":
                raise self.error(JSONDecodeError("Expecting ',' delimiter", self.text, self.at))
        self.at += 1

    def next_character(self) -> str:
        """Skip whitespace; return the next character, "" at the end of the file."""
        while True:
            blanks = BLANKS.match(self.text, self.at)
            assert blanks is not None, "the pattern matches an empty text too"
            self.at = blanks.end()
            if self.at < len(self.text) or self.whole:
                return self.text[self.at : self.at + 1]
            self.read_more()

    def value(self) -> Any:
        """Parse the value that begins here, reading on until it is complete."""
        self.value_start = self.characters_before + self.at
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
                    self.value_end = self.characters_before + end
                    return value
            self.read_more()

    def read_more(self) -> None:
        """Drop the parsed text and read on; each retry of one value doubles what is read."""
        read, unread = self.text[: self.at], self.text[self.at :]
        self.characters_before += len(read)
        self.lines_before += read.count("\n")
        self.columns_before = self.columns_of(read)
        more = self.file.read(max(CHARACTERS_AT_ONCE, len(unread)))
        self.whole = not more
        self.text, self.at = unread + more, 0

    def columns_of(self, read: str) -> int:
        """Characters after the last line end, up to the end of `read`."""
        line_end = read.rfind("\n")
        return len(read) + self.columns_before if line_end < 0 else len(read) - line_end - 1

    def error(self, error: ValueError | RecursionError) -> DataError:
        """The error for a fault in `text`, with its line and column in the file."""
        if isinstance(error, JSONDecodeError):
            line = self.lines_before + error.lineno
            column = self.columns_of(self.text[: error.pos]) + 1
            reason = f"invalid JSON: {error.msg} at line {line} column {column}"
        else:
            reason = _fault(error)
        return DataError(
            self.path,
            reason,
            remedy="fix it there, or rename the file to .jsonl if it has one object per line",
        )


def _fault(error: ValueError | RecursionError) -> str:
    """What is wrong with a value, and the column if the parser knows it."""
    match error:
        case JSONDecodeError():
            return f"invalid JSON: {error.msg} at column {error.colno}"
        case RecursionError():
            return "lists and objects are nested too deeply"
        case _:
            return "a number has too many digits"
