"""Read the records of csv, tsv, parquet and arrow files."""

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from yrunner.data.readers.text import Advance, Damaged, FileRow, open_text
from yrunner.errors import DataError, Origin

# The csv module's limit holds for all readers, and is shorter than a long document.
LONGEST_FIELD = 2**31 - 1
RECORDS_AT_ONCE = 1000
BYTES_AT_ONCE = 1 << 20
LONGEST_HEADER = 1 << 16
ARROW_FILE = b"ARROW1"
"""How an arrow file begins; an arrow stream, as the datasets library writes it, does not."""

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""What may separate the fields of a table, and its name."""
TAB = "\t"


def separator_of(path: Path) -> str:
    """What separates the fields of a csv or tsv file: whatever gives its header most names."""
    separators = "".join(SEPARATORS)
    with open_text(path, newline="") as text:
        lines = iter(lambda: text.readline(LONGEST_HEADER), "")
        header = next((line for line in lines if line.strip(f"\r\n {separators}")), "")
    if re.fullmatch(r"sep=.\s*", header):
        raise DataError(
            path, f"begins with {header.strip()}, a line for Excel", remedy="remove the first line"
        )

    def num_names(separator: str) -> int:
        return sum(map(bool, next(csv.reader([header.strip()], delimiter=separator), [])))

    return max([usual_separator(path), *SEPARATORS], key=num_names)


def usual_separator(path: Path) -> str:
    """The separator that the name of a csv or tsv file promises."""
    return TAB if path.name.lower().removesuffix(".gz").endswith(".tsv") else ","


def read_table(path: Path, advance: Advance | None = None) -> Iterator[FileRow]:
    """Yield each record of a csv or tsv file as a dict; one with another length as `Damaged`.

    Columns without a name are left out.
    """
    csv.field_size_limit(LONGEST_FIELD)
    separator, number = separator_of(path), 0
    # newline="" keeps the line ends inside quoted fields.
    with open_text(path, newline="", advance=advance) as text:
        records = csv.reader(text, delimiter=separator, strict=True)
        try:
            header = _without_blanks(header_of(records))
            _check_header(path, header)
            for number, record in enumerate(filter(None, records), start=1):
                yield Origin(path, number), _as_row(header, record)
        except csv.Error as error:
            raise DataError(
                Origin(path, number + 1),
                f"invalid {'TSV' if separator == TAB else 'CSV'}: {error} "
                f"(line {records.line_num})",
                remedy=f"quote fields that contain {SEPARATORS[separator]} or line ends, and "
                "double any quotes inside them",
            ) from error


def header_of(records: Iterator[list[str]]) -> list[str]:
    """The first record with a value; empty if there is none."""
    return next(filter(any, records), [])


def _as_row(header: Sequence[str], record: list[str]) -> dict[str, str] | Damaged:
    # A table of Excel ends each line with the separators of all columns in use.
    fields = record if len(record) <= len(header) else _without_blanks(record)
    if len(fields) > len(header) or len(record) < len(header):
        return Damaged(f"number of fields is {len(fields)}, but {len(header)} in the header")
    return {name: field for name, field in zip(header, record, strict=False) if name}


def _without_blanks(record: list[str]) -> list[str]:
    """The record up to its last field with a value."""
    last = max((number for number, field in enumerate(record) if field.strip()), default=-1)
    return record[: last + 1]


def _check_header(path: Path, header: list[str]) -> None:
    duplicates = [name for name, count in Counter(header).items() if name and count > 1]
    if duplicates:
        raise DataError(
            path, f'duplicate column "{duplicates[0]}" in the header', remedy="rename one of them"
        )


def read_parquet(path: Path, advance: Advance | None = None) -> Iterator[FileRow]:
    """Yield each record of a parquet file as a dict; dates and times become text."""
    return _read_columnar(path, "parquet", _parquet_records(path, advance))


def read_arrow(path: Path, advance: Advance | None = None) -> Iterator[FileRow]:
    """`read_parquet` for an arrow file, as `save_to_disk` of the datasets library writes it."""
    return _read_columnar(path, "arrow", _arrow_records(path, advance))


def _read_columnar(
    path: Path, kind: str, records: Iterator[dict[str, object]]
) -> Iterator[FileRow]:
    from pyarrow import ArrowException

    number = 0
    try:
        for number, record in enumerate(records, start=1):
            yield Origin(path, number), record
    except UnicodeDecodeError as error:
        raise DataError(
            path,
            f"a string after row {number} is not UTF-8",
            remedy="write the file again with UTF-8 strings",
        ) from error
    # A damaged file raises any of these; Python's own, where a value does not convert to Python.
    except (ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(
            path, f"damaged {kind} file: {reason}", remedy="write or download it again"
        ) from error


def _parquet_records(path: Path, advance: Advance | None) -> Iterator[dict[str, object]]:
    from pyarrow.parquet import ParquetFile

    num_bytes = path.stat().st_size
    num_read = num_reported = 0
    # By default whole column chunks are read ahead, and a chunk may be as large as the file.
    flat = {"pre_buffer": False, "buffer_size": BYTES_AT_ONCE}
    with path.open("rb") as handle, ParquetFile(handle, **flat) as file:
        _check_header(path, file.schema_arrow.names)
        for batch in file.iter_batches(RECORDS_AT_ONCE):
            yield from _records_of(batch)
            num_read += batch.num_rows
            if advance is not None:
                # Columns are stored one after the other: positions in the file show no progress.
                num_now = num_bytes * num_read // file.metadata.num_rows
                advance(num_now - num_reported)
                num_reported = num_now
    if advance is not None:
        advance(num_bytes - num_reported)


def _arrow_records(path: Path, advance: Advance | None) -> Iterator[dict[str, object]]:
    num_bytes, num_reported = path.stat().st_size, 0
    with open_arrow(path) as (batches, handle):
        for batch in batches:
            _check_header(path, batch.schema.names)
            # Reading a damaged batch would end Python.
            batch.validate(full=True)
            for start in range(0, batch.num_rows, RECORDS_AT_ONCE):
                yield from _records_of(batch.slice(start, RECORDS_AT_ONCE))
            if advance is not None:
                num_now = min(handle.tell(), num_bytes)
                advance(max(0, num_now - num_reported))
                num_reported = max(num_now, num_reported)
    if advance is not None:
        advance(num_bytes - num_reported)


@contextmanager
def open_arrow(path: Path) -> Iterator[tuple[Iterator[Any], Any]]:
    """The record batches of an arrow file, in either of its two forms, and the open file.

    The file is mapped into memory: a batch may be as large as the file.
    """
    from pyarrow import ipc, memory_map

    with path.open("rb") as plain:
        is_stream = plain.read(len(ARROW_FILE)) != ARROW_FILE
    with memory_map(str(path)) as handle:
        if is_stream:
            yield iter(ipc.open_stream(handle)), handle
        else:
            file = ipc.open_file(handle)
            yield map(file.get_batch, range(file.num_record_batches)), handle


def _records_of(batch: Any) -> list[dict[str, object]]:
    """The records of a batch. Python's dates have neither nanoseconds nor years after 9999."""
    from pyarrow import RecordBatch, string, types

    columns = [
        column.cast(string()) if types.is_temporal(column.type) else column
        for column in batch.columns
    ]
    return RecordBatch.from_arrays(columns, names=batch.schema.names).to_pylist()
