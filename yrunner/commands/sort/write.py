"""Rewrite rows of data files in a new order, byte for byte."""

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
            difference = f"has other columns than {first.name}"
        else:
            continue
        raise DataError(path, f"{difference}: {NOT_TOGETHER}", remedy=ONE_BY_ONE)


def ending_of(files: Sequence[Path]) -> str:
    """The ending of the sorted file: compressed only if all files are."""
    kind = kind_of(files[0]) or ""
    return f"{kind}.gz" if all(map(is_packed, files)) else kind


def write_rows(files: Sequence[Path], places: Sequence[RowPlace], path: Path) -> None:
    """Write these rows of the files to `path`, in this order, atomically.

    The files have passed `check_one_kind`, and `path` has the ending of `ending_of`. Rows of text
    files keep every byte, including quotes, escapes and inner line ends. Tables keep their header,
    parquet files their schema and compression.
    """
    with whole_file(path) as file:
        if kind_of(path) == ".parquet":
            _write_parquet(files, places, file)
        elif is_packed(path):
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
    """The bytes of a file; a compressed one is unpacked into a temporary file in `folder`.

    Seeking back in a compressed file would unpack it again.
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
    """The content and the compression of a parquet file."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        packing = file.metadata.row_group(0).column(0).compression
        return file.read(), "none" if packing == "UNCOMPRESSED" else packing


def _columns(path: Path) -> object:
    """The columns, which must be equal in all files; None for kinds that name them in each row."""
    match kind_of(path):
        case ".csv" | ".tsv" as kind:
            with open_text(path, newline="") as text:
                records = csv.reader(text, delimiter=SEPARATORS[kind])
                return next(filter(None, records), [])
        case ".parquet":
            from pyarrow.parquet import read_schema

            return read_schema(path)
    return None


@dataclass(frozen=True)
class RowSpans:
    """The rows of a file, without line ends, and the bytes around them."""

    opening: bytes
    """Before the first row: the header of a table, the bracket of an array."""
    between: bytes
    closing: bytes
    spans: NDArray[np.int64]
    """Shape [rows, 3], see `ByteSpan`, in file order."""

    def find(self, row: int) -> tuple[int, int]:
        """The first byte of a row, and the end of its last."""
        index = int(np.searchsorted(self.spans[:, 0], row))
        number, start, end = map(int, self.spans[index])
        assert number == row, "this row has been read from the file"
        return start, end


def find_spans(file: BinaryIO, kind: str) -> RowSpans:
    """The rows of a file of this kind (`.jsonl`) that `read_rows` has read without a fault.

    Only `.json` is read into memory as a whole.
    """
    first = file.read(len(BYTE_ORDER_MARK))
    start = len(first) if first == BYTE_ORDER_MARK else 0
    file.seek(start)
    return FINDERS[kind](file, start)


def _find_lines(file: BinaryIO, start: int) -> RowSpans:
    return RowSpans(b"", b"\n", b"\n", _array(_spans_of_lines(file, start)))


def _spans_of_lines(file: BinaryIO, start: int) -> Iterator[ByteSpan]:
    for number, line in enumerate(file, start=1):
        # As text, because Unicode has more whitespace than ASCII.
        if line.decode().strip():
            yield number, start, start + len(line.removesuffix(b"\n"))
        start += len(line)


def _find_records(separator: str) -> Callable[[BinaryIO, int], RowSpans]:
    """Find records with the csv module, because one can span several lines."""

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
    """The header, as row 0, and the records after it."""
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
    """The items of the array; another value counts as an array of one."""
    text = file.read().decode()
    opened = _behind_blanks(text, 0)
    if text[opened] != "[":
        _, end = json.JSONDecoder().raw_decode(text, opened)
        return _with_bytes(text, [(opened, end)], ("[", ",", "]\n"), start)
    items = list(_items(text, opened + 1))
    first, last = items[0], items[-1]
    # Keep an array that is written over several lines that way.
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
    assert blanks is not None, "the pattern matches the empty string"
    return blanks.end()


def _with_bytes(
    text: str, items: list[tuple[int, int]], around: tuple[str, str, str], start: int
) -> RowSpans:
    """Convert character offsets to byte offsets."""
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
