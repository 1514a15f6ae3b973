"""Rows written in another order, each exactly as it stands in its file."""

import csv
import gzip
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from yrunner.commands.row_spans import SEPARATORS, RowSpans, find_spans
from yrunner.data.files import kind_of
from yrunner.data.text_files import is_packed, open_text
from yrunner.errors import DataError
from yrunner.run_dir import whole_file

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
