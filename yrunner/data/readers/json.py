"""Read json and jsonl files one value at a time, even a file that is a single array.

The content decides how a file is read, not its ending: people name either kind as the other.
"""

import json
import re
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Literal, TextIO

from yrunner.data.readers.text import Advance, Damaged, FileRow, open_text
from yrunner.errors import DataError, Origin

CHARACTERS_AT_ONCE = 1 << 20
# Longer than any token that more text could change: a number (1e+), two \u escapes, -Infinity.
MARGIN = 16
BLANKS = re.compile(r"[ \t\n\r]*")

# Python refuses numbers of over 4,300 digits with a plain ValueError.
JSON_ERRORS = (ValueError, RecursionError)


Layout = Literal["lines", "values", "wrapped"]
"""A value per line; values one after the other or in arrays; or an array inside an object."""

WRAPPERS = ("data", "rows", "examples", "records", "items", "instances", "samples", "dataset")
SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")
"""Keys of an object that holds the rows of a file."""
ABOUT = (
    "version", "name", "title", "description", "info", "meta", "metadata", "license", "date",
    "source", "language", "split", "total", "count", "num_rows", "features", "columns", "schema",
)  # fmt: skip
"""Keys that may stand before them."""
TURN_KEYS = frozenset({"role", "from"})


def read_json(path: Path, advance: Advance | None = None) -> Iterator[FileRow]:
    """Yield the rows of a json or jsonl file.

    Of a file that has a value per line, each line that is not blank, numbered by line; an invalid
    line is `Damaged`. Of other files each value, or the items of each array, counted from 1.
    """
    layout = layout_of(path)
    with open_text(path, advance=advance) as text:
        if layout == "lines":
            parser = _Parser()
            for number, line in enumerate(text, start=1):
                if line := line.rstrip():
                    yield Origin(path, number), parser.line(line)
        else:
            for number, value in enumerate(Document(path, text).rows(layout), start=1):
                yield Origin(path, number), value


def layout_of(path: Path) -> Layout:
    """How the rows lie in a file, by its first value."""
    promised: Layout = "lines" if promises_lines(path) else "values"
    with open_text(path) as text:
        document = Document(path, text)
        try:
            match document.next_character():
                case "[" if promised == "lines":
                    return "values" if _is_row(next(document.items(), None)) else "lines"
                case "{":
                    return _layout_of_objects(path, promised)
        except DataError:
            # Reading the rows says where the fault is.
            pass
    return promised


def _layout_of_objects(path: Path, promised: Layout) -> Layout:
    if promised == "values" and _is_wrapped(path):
        return "wrapped"
    with open_text(path) as text:
        document = Document(path, text)
        document.next_character()
        document.value()
        start = document.at - (document.value_end - document.value_start)
        if "\n" in document.text[start : document.at]:
            return "values"
        following = document.next_character()
        return "lines" if following == "{" and document.on_new_line else promised


def _is_wrapped(path: Path) -> bool:
    with open_text(path) as text:
        document = Document(path, text)
        document.next_character()
        for key in document.members():
            if key in (*WRAPPERS, *SPLITS) and document.next_character() == "[":
                return _is_row(next(document.items(), None))
            if key not in ABOUT:
                return False
            document.value()
    return False


def _is_row(value: Any) -> bool:
    """Whether a value is a row, not a turn of a conversation."""
    return isinstance(value, dict) and value.keys().isdisjoint(TURN_KEYS)


def promises_lines(path: Path) -> bool:
    """Whether the name of a file promises a value per line."""
    return not path.name.lower().removesuffix(".gz").endswith(".json")


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
        self.on_new_line = False
        """Whether a line has ended since the last value."""
        # Of the last value, in characters of the file.
        self.value_start = self.value_end = 0
        self.characters_before = 0
        # Line ends before `text`, and characters after the last of them.
        self.lines_before = self.columns_before = 0

    def rows(self, layout: Layout) -> Iterator[Any]:
        """The rows of a file of this layout. Raises `DataError` for invalid JSON."""
        return self.wrapped() if layout == "wrapped" else self.values()

    def values(self) -> Iterator[Any]:
        """Each value, or the items of each array. Raises `DataError` for invalid JSON.

        Several values begin on lines of their own. Several arrays are found in jsonl files only.
        """
        repeated = ("{", "[") if promises_lines(self.path) else ("{",)
        opening = first = self.next_character()
        while opening:
            if opening == "[":
                yield from self.items()
            else:
                yield self.value()
            opening = self.next_character()
            if opening and not (opening == first and opening in repeated and self.on_new_line):
                raise self.error(JSONDecodeError("Extra data", self.text, self.at))

    def wrapped(self) -> Iterator[Any]:
        """The items of the array inside an object. Raises `DataError` if it has several splits."""
        found = []
        self.next_character()
        for key in self.members():
            is_array = self.next_character() == "["
            if not is_array or key not in (*WRAPPERS, *SPLITS):
                self.value()
                continue
            found.append(key)
            if len(found) > 1 or key in SPLITS[1:]:
                names = " and ".join(f'"{name}"' for name in found)
                raise DataError(
                    self.path,
                    f"is an object with the rows of {names}",
                    remedy="save the rows of each as a file, and name them under data.train and "
                    "data.validation",
                )
            yield from self.items()
        if self.next_character():
            raise self.error(JSONDecodeError("Extra data", self.text, self.at))

    def members(self) -> Iterator[str]:
        """Each key of the object that begins here; its value must be read before the next."""
        self.at += 1
        character = self.next_character()
        while character != "}":
            if self.text[self.at : self.at + 1] != '"':
                reason = "Expecting property name enclosed in double quotes"
                raise self.error(JSONDecodeError(reason, self.text, self.at))
            key = self.value()
            if self.next_character() != ":":
                raise self.error(JSONDecodeError("Expecting ':' delimiter", self.text, self.at))
            self.at += 1
            self.next_character()
            yield str(key)
            character = self.next_character()
            if character == ",":
                self.at += 1
                self.next_character()
            elif character != "}":
                raise self.error(JSONDecodeError("Expecting ',' delimiter", self.text, self.at))
        self.at += 1

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
        self.on_new_line = False

    def next_character(self) -> str:
        """Skip whitespace; return the next character, "" at the end of the file."""
        while True:
            blanks = BLANKS.match(self.text, self.at)
            assert blanks is not None, "the pattern matches an empty text too"
            if "\n" in blanks[0]:
                self.on_new_line = True
            self.at = blanks.end()
            if self.at < len(self.text) or self.whole:
                return self.text[self.at : self.at + 1]
            self.read_more()

    def value(self) -> Any:
        """Parse the value that begins here, reading on until it is complete."""
        self.value_start = self.characters_before + self.at
        self.on_new_line = False
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
            reason = f"invalid JSON: {_said(error)} at line {line} column {column}"
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
            return f"invalid JSON: {_said(error)} at column {error.colno}"
        case RecursionError():
            return "lists and objects are nested too deeply"
        case _:
            return "a number has too many digits"


def _said(error: JSONDecodeError) -> str:
    """What is wrong; some of Python's sentences end with "at"."""
    return error.msg.removesuffix(" at")
