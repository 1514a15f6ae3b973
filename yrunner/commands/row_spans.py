"""Where each row of a text file stands, byte by byte, so that it can be written again unchanged."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from yrunner.data.json_files import BLANKS
from yrunner.data.table_files import LONGEST_FIELD

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""What stands between the fields of a table."""

Span = tuple[int, int, int]
"""Number of a row as `Origin` counts it, its first byte, and the one behind its last."""


@dataclass(frozen=True)
class RowSpans:
    """The rows of a file, and the bytes around them. A row's own line end is not part of it."""

    opening: bytes
    """What stands before the first row: the header of a table, the bracket of an array."""
    between: bytes
    closing: bytes
    spans: NDArray[np.int64]
    """Shape [rows, 3]: see `Span`; in the order of the file."""

    def find(self, row: int) -> tuple[int, int]:
        """The first byte of a row, and the one behind its last."""
        place = int(np.searchsorted(self.spans[:, 0], row))
        number, start, end = map(int, self.spans[place])
        assert number == row, "the file holds this row, it has been read"
        return start, end


def find_spans(file: BinaryIO, kind: str) -> RowSpans:
    """The rows of a file of this kind (`.jsonl`), which `read_rows` has read without a fault.

    Only the places are kept, but for `.json`, whose text is in memory as long as it is searched.
    """
    first = file.read(len(BYTE_ORDER_MARK))
    start = len(first) if first == BYTE_ORDER_MARK else 0
    file.seek(start)
    return FINDERS[kind](file, start)


def _find_lines(file: BinaryIO, start: int) -> RowSpans:
    return RowSpans(b"", b"\n", b"\n", _array(_spans_of_lines(file, start)))


def _spans_of_lines(file: BinaryIO, start: int) -> Iterator[Span]:
    for number, line in enumerate(file, start=1):
        # As text, because Unicode knows more blanks than bytes do.
        if line.decode().strip():
            yield number, start, start + len(line.removesuffix(b"\n"))
        start += len(line)


def _find_records(separator: str) -> Callable[[BinaryIO, int], RowSpans]:
    """A record of a table may go on over several lines, which only the csv module can tell."""

    def find_records(file: BinaryIO, start: int) -> RowSpans:
        csv.field_size_limit(LONGEST_FIELD)
        spans = _spans_of_records(file, start, separator)
        _, first, end = next(spans)
        records = _array(spans)
        file.seek(first)
        header = file.read(end - first)
        behind = file.read(2)
        line_end = behind if behind == b"\r\n" else behind[:1]
        return RowSpans(header + line_end, line_end, line_end, records)

    return find_records


def _spans_of_records(file: BinaryIO, start: int, separator: str) -> Iterator[Span]:
    """The header, as row 0, and the records behind it."""
    end = behind = start

    def lines(text: Iterable[str]) -> Iterator[str]:
        nonlocal end, behind
        for line in text:
            end = behind + len(line.rstrip("\r\n").encode())
            behind += len(line.encode())
            yield line

    text = io.TextIOWrapper(file, "utf-8", newline="")
    number = 0
    for record in csv.reader(lines(text), delimiter=separator, strict=True):
        if record:
            yield number, start, end
            number += 1
        start = behind
    # The wrapper would close the file.
    text.detach()


def _find_items(file: BinaryIO, start: int) -> RowSpans:
    """The items of the one array; a value that is none is an array of itself."""
    text = file.read().decode()
    opened = _behind_blanks(text, 0)
    if text[opened] != "[":
        _, end = json.JSONDecoder().raw_decode(text, opened)
        return _with_bytes(text, [(opened, end)], ("[", ",", "]\n"), start)
    items = list(_items(text, opened + 1))
    first, last = items[0], items[-1]
    # An array that is written over several lines stays so.
    between = text[first[1] : items[1][0]] if len(items) > 1 else f",{text[opened + 1 : first[0]]}"
    return _with_bytes(text, items, (text[opened : first[0]], between, text[last[1] :]), start)


def _items(text: str, place: int) -> Iterator[tuple[int, int]]:
    decoder = json.JSONDecoder()
    while text[place := _behind_blanks(text, place)] != "]":
        _, end = decoder.raw_decode(text, place)
        yield place, end
        place = _behind_blanks(text, end)
        place += text[place] == ","


def _behind_blanks(text: str, place: int) -> int:
    blanks = BLANKS.match(text, place)
    assert blanks is not None, "no blank is a match too"
    return blanks.end()


def _with_bytes(
    text: str, items: list[tuple[int, int]], around: tuple[str, str, str], start: int
) -> RowSpans:
    """Places of bytes for those of characters."""
    spans: list[Span] = []
    place = 0
    for number, (first, end) in enumerate(items, start=1):
        start += len(text[place:first].encode())
        spans.append((number, start, start + len(text[first:end].encode())))
        start, place = spans[-1][2], end
    opening, between, closing = (part.encode() for part in around)
    return RowSpans(opening, between, closing, _array(spans))


def _array(spans: Iterable[Span]) -> NDArray[np.int64]:
    flat = np.fromiter((value for span in spans for value in span), np.int64)
    return flat.reshape(-1, 3)


FINDERS: dict[str, Callable[[BinaryIO, int], RowSpans]] = {
    ".jsonl": _find_lines,
    ".txt": _find_lines,
    **{kind: _find_records(separator) for kind, separator in SEPARATORS.items()},
    ".json": _find_items,
}
