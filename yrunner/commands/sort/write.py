"""Where each row of a text file stands, byte by byte, so that it can be written again unchanged.

Rows written in another order, each exactly as it stands in its file.
"""

import csv
import gzip
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from yrunner.data.readers.files import kind_of
from yrunner.data.readers.json import BLANKS
from yrunner.data.readers.tables import LONGEST_FIELD
from yrunner.data.readers.text import is_packed, open_text
from yrunner.errors import DataError
from yrunner.storage.run_dir import whole_file

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""What stands between the fields of a table."""

ByteSpan = tuple[int, int, int]
"""Number of a row as `Origin` counts it, its first byte, and the one behind its last."""


@dataclass(frozen=True)
class RowSpans:
    """The rows of a file, and the bytes around them. A row's own line end is not part of it."""

    opening: bytes
    """What stands before the first row: the header of a table, the bracket of an array."""
    between: bytes
    closing: bytes
    spans: NDArray[np.int64]
    """Shape [rows, 3]: see `ByteSpan`; in the order of the file."""

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


def _spans_of_lines(file: BinaryIO, start: int) -> Iterator[ByteSpan]:
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


def _spans_of_records(file: BinaryIO, start: int, separator: str) -> Iterator[ByteSpan]:
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
    spans: list[ByteSpan] = []
    place = 0
    for number, (first, end) in enumerate(items, start=1):
        start += len(text[place:first].encode())
        spans.append((number, start, start + len(text[first:end].encode())))
        start, place = spans[-1][2], end
    opening, between, closing = (part.encode() for part in around)
    return RowSpans(opening, between, closing, _array(spans))


def _array(spans: Iterable[ByteSpan]) -> NDArray[np.int64]:
    flat = np.fromiter((value for span in spans for value in span), np.int64)
    return flat.reshape(-1, 3)


FINDERS: dict[str, Callable[[BinaryIO, int], RowSpans]] = {
    ".jsonl": _find_lines,
    ".txt": _find_lines,
    **{kind: _find_records(separator) for kind, separator in SEPARATORS.items()},
    ".json": _find_items,
}


ROWS_AT_ONCE = 100_000
"""Rows of a parquet file that are written as one group."""

NOT_TOGETHER = "their rows cannot stand in one sorted file"
ONE_BY_ONE = "sort them one by one, each by a recipe with an output of its own"

RowPlace = tuple[int, int]
"""A row: the number of its file in the list of files, from 0, and its number there, from 1."""


def check_one_kind(files: Sequence[Path]) -> None:
    """Raise `DataError` where the rows of these files cannot stand in one file together."""
    first, *others = dict.fromkeys(files)
    kind, columns = kind_of(first), _columns(first)
    for path in others:
        if kind_of(path) != kind:
            difference = f"is no {kind} file as {first.name} is"
        elif _columns(path) != columns:
            difference = f"has other columns than {first.name}"
        else:
            continue
        raise DataError(path, f"{difference}: {NOT_TOGETHER}", remedy=ONE_BY_ONE)


def ending_of(files: Sequence[Path]) -> str:
    """The ending of a file with the rows of all: packed only where all of them are."""
    kind = kind_of(files[0]) or ""
    return f"{kind}.gz" if all(map(is_packed, files)) else kind


def write_rows(files: Sequence[Path], places: Sequence[RowPlace], path: Path) -> None:
    """Write these rows of the files to `path`, in this order, whole or not at all.

    The files have passed `check_one_kind`, and `path` has the ending of `ending_of`. Of a text file
    every byte of a row is kept: quotes, escapes, blanks, and in json files the line ends inside. Of
    a table the header is kept, too, and of a parquet file the schema and the compression.
    """
    with whole_file(path) as file:
        if kind_of(path) == ".parquet":
            _write_parquet(files, places, file)
        elif is_packed(path):
            # Without a name and a time, equal rows make equal bytes.
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
                _write_text(files, places, packed, path.parent)
        else:
            _write_text(files, places, file, path.parent)


def _write_text(
    files: Sequence[Path], places: Sequence[RowPlace], out: BinaryIO | gzip.GzipFile, folder: Path
) -> None:
    with ExitStack() as opened:
        sources: dict[Path, tuple[BinaryIO, RowSpans]] = {}
        for path in dict.fromkeys(files[number] for number, _ in places):
            file = opened.enter_context(_unpacked(path, folder))
            sources[path] = file, find_spans(file, kind_of(path) or "")
        _, around = sources[files[places[0][0]]]
        before = around.opening
        for number, row in places:
            file, spans = sources[files[number]]
            start, end = spans.find(row)
            file.seek(start)
            out.write(before + file.read(end - start))
            before = around.between
        out.write(around.closing)


@contextmanager
def _unpacked(path: Path, folder: Path) -> Iterator[BinaryIO]:
    """The bytes of a file; those of a packed one in a nameless file in `folder`.

    In a packed file one cannot go back without unpacking it anew.
    """
    if not is_packed(path):
        with path.open("rb") as file:
            yield file
        return
    with TemporaryFile(dir=folder) as unpacked, gzip.open(path) as packed:
        shutil.copyfileobj(packed, unpacked)
        unpacked.seek(0)
        yield unpacked


def _write_parquet(files: Sequence[Path], places: Sequence[RowPlace], out: BinaryIO) -> None:
    from pyarrow import Table, concat_tables
    from pyarrow.parquet import ParquetWriter

    starts: dict[Path, int] = {}
    tables: list[Table] = []
    for path in dict.fromkeys(files):
        starts[path] = sum(table.num_rows for table in tables)
        table, compression = _read_table(path)
        tables.append(table)
    schema = tables[0].schema
    whole = concat_tables([table.replace_schema_metadata(schema.metadata) for table in tables])
    indices = [starts[files[number]] + row - 1 for number, row in places]
    with ParquetWriter(out, schema, compression=compression) as writer:
        for start in range(0, len(indices), ROWS_AT_ONCE):
            writer.write_table(whole.take(indices[start : start + ROWS_AT_ONCE]))


def _read_table(path: Path) -> tuple[Any, str]:
    """The content of a parquet file, and how it is packed."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        packing = file.metadata.row_group(0).column(0).compression
        return file.read(), "none" if packing == "UNCOMPRESSED" else packing


def _columns(path: Path) -> object:
    """What has to be equal in files that become one; None for kinds whose rows name their own."""
    match kind_of(path):
        case ".csv" | ".tsv" as kind:
            with open_text(path, newline="") as text:
                records = csv.reader(text, delimiter=SEPARATORS[kind])
                return next(filter(None, records), [])
        case ".parquet":
            from pyarrow.parquet import read_schema

            return read_schema(path)
    return None
