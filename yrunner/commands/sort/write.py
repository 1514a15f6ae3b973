"""Rewrite rows of data files in a new order, byte for byte.

Text files are read as Latin-1 here: every byte is one character, so a reader's offsets are offsets
of bytes. What separates rows and fields is ASCII, which UTF-8 never uses inside another character.
"""

import csv
import gzip
import io
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, TextIO

import numpy as np
from numpy.typing import NDArray

from yrunner.data.readers.files import COLUMNAR, kind_of
from yrunner.data.readers.json import Document, layout_of
from yrunner.data.readers.tables import (
    LONGEST_FIELD,
    header_of,
    open_arrow,
    separator_of,
)
from yrunner.data.readers.text import is_gzipped, open_text
from yrunner.errors import DataError
from yrunner.storage.run_dir import whole_file

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ROWS_AT_ONCE = 100_000
"""Rows per row group of a parquet file."""
NOT_TOGETHER = "their rows cannot share one sorted file"
ONE_BY_ONE = "sort them one by one, each with a recipe that has another output"

RowPlace = tuple[int, int]
"""A row: the index of its file, from 0, and its number there, from 1."""
ByteSpan = tuple[int, int, int]
"""The number of a row as in `Origin`, its first byte, and the end of its last."""


def check_one_kind(files: Sequence[Path]) -> None:
    """Raise `DataError` if the rows of these files cannot share one file."""
    first, *others = dict.fromkeys(files)
    kind, columns = kind_of(first), _columns(first)
    for path in others:
        if kind_of(path) != kind:
            difference = f"is not a {kind} file like {first.name}"
        elif _columns(path) != columns:
            other = "another layout" if isinstance(columns, str) else "other columns"
            difference = f"has {other} than {first.name}"
        else:
            continue
        raise DataError(path, f"{difference}: {NOT_TOGETHER}", remedy=ONE_BY_ONE)


def ending_of(files: Sequence[Path]) -> str:
    """The ending of the sorted file: compressed only if all files are."""
    kind = kind_of(files[0]) or ""
    if kind in COLUMNAR:
        return ".parquet"
    return f"{kind}.gz" if all(map(is_gzipped, files)) else kind


def write_rows(files: Sequence[Path], places: Sequence[RowPlace], path: Path) -> None:
    """Write these rows of the files to `path`, in this order, atomically.

    The files have passed `check_one_kind`, and `path` has the ending of `ending_of`. Rows of text
    files keep every byte, including quotes, escapes and inner line ends. Tables keep their header,
    parquet files their schema and compression.
    """
    with whole_file(path) as file:
        if kind_of(path) == ".parquet":
            _write_parquet(files, places, file)
        elif is_gzipped(path):
            # Without name and time, equal rows give equal bytes.
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
            sources[path] = file, find_spans(path, file)
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
    """The bytes of a file; a compressed one is unpacked into a temporary file in `folder`.

    Seeking back in a compressed file would unpack it again.
    """
    if not is_gzipped(path):
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
    """The content and the compression of a parquet file; of an arrow file, parquet's usual one."""
    from pyarrow import Table
    from pyarrow.parquet import ParquetFile

    if kind_of(path) == ".arrow":
        with open_arrow(path) as (batches, _):
            return Table.from_batches(batches), "snappy"
    with ParquetFile(path) as file:
        packing = file.metadata.row_group(0).column(0).compression
        return file.read(), "none" if packing == "UNCOMPRESSED" else packing


def _columns(path: Path) -> object:
    """The columns of a table or the layout of JSON, which must be equal in all files."""
    match kind_of(path):
        case ".csv" | ".tsv":
            separator = separator_of(path)
            with open_text(path, newline="") as text:
                records = csv.reader(text, delimiter=separator)
                return separator, header_of(records)
        case ".json" | ".jsonl" | ".ndjson":
            return layout_of(path)
        case ".arrow":
            with open_arrow(path) as (batches, _):
                return next((batch.schema for batch in batches), None)
        case ".parquet":
            from pyarrow import ArrowException
            from pyarrow.parquet import read_schema

            try:
                return read_schema(path)
            except (ArrowException, OSError) as error:
                raise DataError(
                    path, "not a readable Parquet file", remedy="write or download it again"
                ) from error
    return None


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


def find_spans(path: Path, file: BinaryIO) -> RowSpans:
    """Find the rows of a file that `read_rows` has read without a fault.

    `file` holds the content of `path`, unpacked.
    """
    first = file.read(len(BYTE_ORDER_MARK))
    start = len(first) if first == BYTE_ORDER_MARK else 0
    file.seek(start)
    match kind_of(path):
        case ".json" | ".jsonl" | ".ndjson" if layout_of(path) != "lines":
            return _find_items(path, file, start)
        case ".csv" | ".tsv":
            return _find_records(file, start, separator_of(path))
        case _:
            return RowSpans(b"", b"\n", b"\n", _array(_spans_of_lines(file, start)))


def _spans_of_lines(file: BinaryIO, start: int) -> Iterator[ByteSpan]:
    for number, line in enumerate(file, start=1):
        # Decode first: Unicode has more blanks than ASCII.
        if line.decode().strip():
            yield number, start, start + len(line.removesuffix(b"\n"))
        start += len(line)


def _find_records(file: BinaryIO, start: int, separator: str) -> RowSpans:
    spans = _array(_spans_of_records(file, start, separator))
    opening = _bytes(file, *spans[0, 1:])
    behind = _bytes(file, spans[0, 2], spans[0, 2] + 2)
    line_end = behind if behind == b"\r\n" else behind[:1]
    return RowSpans(opening + line_end, line_end, line_end, spans[1:])


def _spans_of_records(file: BinaryIO, start: int, separator: str) -> Iterator[ByteSpan]:
    """The header as row 0, then the records; a quoted field may hold line ends."""
    csv.field_size_limit(LONGEST_FIELD)
    end = behind = start

    def lines(text: Iterable[str]) -> Iterator[str]:
        nonlocal end, behind
        for line in text:
            end = behind + len(line.rstrip("\r\n"))
            behind += len(line)
            yield line

    with _as_latin_1(file) as text:
        records = csv.reader(lines(text), delimiter=separator, strict=True)
        number = 0
        for record in records:
            if any(record) or (record and number):
                yield number, start, end
                number += 1
            start = behind


def _find_items(path: Path, file: BinaryIO, start: int) -> RowSpans:
    """The items of the array that the file holds; any other value becomes an array of one."""
    spans = _array(_spans_of_items(path, file, start))
    opening = _bytes(file, start, spans[0, 1]).lstrip()
    if not opening:
        return RowSpans(b"[", b",", b"]\n", spans)
    # An array written over several lines keeps its line ends.
    between = _bytes(file, spans[0, 2], spans[1, 1]) if len(spans) > 1 else b"," + opening[1:]
    return RowSpans(opening, between, _bytes(file, spans[-1, 2]), spans)


def _spans_of_items(path: Path, file: BinaryIO, start: int) -> Iterator[ByteSpan]:
    with _as_latin_1(file) as text:
        document = Document(path, text)
        for number, _ in enumerate(document.rows(layout_of(path)), start=1):
            yield number, start + document.value_start, start + document.value_end


@contextmanager
def _as_latin_1(file: BinaryIO) -> Iterator[TextIO]:
    text = io.TextIOWrapper(file, "latin-1", newline="")
    yield text
    # The wrapper would close the file.
    text.detach()


def _bytes(file: BinaryIO, start: int, end: int | None = None) -> bytes:
    """The bytes of a file from `start` to `end`, or to its end."""
    file.seek(start)
    return file.read(-1 if end is None else end - start)


def _array(spans: Iterable[ByteSpan]) -> NDArray[np.int64]:
    flat = np.fromiter((value for span in spans for value in span), np.int64)
    return flat.reshape(-1, 3)
