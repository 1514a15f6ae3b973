"""Read the records of csv, tsv and parquet files."""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from yrunner.data.readers.text import Advance, Damaged, FileRow, open_text
from yrunner.errors import DataError, Origin

# The csv module's limit holds for all readers, and is shorter than a long document.
LONGEST_FIELD = 2**31 - 1
RECORDS_AT_ONCE = 1000
BYTES_AT_ONCE = 1 << 20


def read_csv(path: Path, advance: Advance | None = None) -> Iterator[FileRow]:
    """Yield each record as a dict; one with too few or too many fields as `Damaged`."""
    return _read_separated(path, "CSV", ",", "commas", advance)


def read_tsv(path: Path, advance: Advance | None = None) -> Iterator[FileRow]:
    """`read_csv` with tabs between fields; quotes work as in csv files."""
    return _read_separated(path, "TSV", "\t", "tabs", advance)


def _read_separated(
    path: Path, kind: str, separator: str, separators: str, advance: Advance | None
) -> Iterator[FileRow]:
    csv.field_size_limit(LONGEST_FIELD)
    number = 0
    # newline="" keeps the line ends inside quoted fields.
    with open_text(path, newline="", advance=advance) as text:
        records = csv.reader(text, delimiter=separator, strict=True)
        try:
            header = next((record for record in records if record), [])
            _check_header(path, header)
            for number, record in enumerate(filter(None, records), start=1):
                if len(record) == len(header):
                    yield Origin(path, number), dict(zip(header, record, strict=True))
                else:
                    reason = f"number of fields is {len(record)}, but {len(header)} in the header"
                    yield Origin(path, number), Damaged(reason)
        except csv.Error as error:
            raise DataError(
                Origin(path, number + 1),
                f"invalid {kind}: {error} (line {records.line_num})",
                remedy=f"quote fields that contain {separators} or line ends, and double any "
                "quotes inside them",
            ) from error


def _check_header(path: Path, header: list[str]) -> None:
    duplicates = [name for name, count in Counter(header).items() if count > 1]
    if duplicates:
        raise DataError(
            path, f'duplicate column "{duplicates[0]}" in the header', remedy="rename one of them"
        )


def read_parquet(path: Path, advance: Advance | None = None) -> Iterator[FileRow]:
    """Yield each record of a parquet file as a dict; dates and times become text."""
    from pyarrow import ArrowException

    number = 0
    try:
        for number, record in enumerate(_records(path, advance), start=1):
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
            path, f"damaged parquet file: {reason}", remedy="write or download it again"
        ) from error


def _records(path: Path, advance: Advance | None) -> Iterator[dict[str, object]]:
    from pyarrow import RecordBatch, string, types
    from pyarrow.parquet import ParquetFile

    num_bytes = path.stat().st_size
    num_read = num_reported = 0
    # By default whole column chunks are read ahead, and a chunk may be as large as the file.
    flat = {"pre_buffer": False, "buffer_size": BYTES_AT_ONCE}
    with path.open("rb") as handle, ParquetFile(handle, **flat) as file:
        _check_header(path, file.schema_arrow.names)
        for batch in file.iter_batches(RECORDS_AT_ONCE):
            # Python's dates have neither nanoseconds nor years after 9999.
            columns = [
                column.cast(string()) if types.is_temporal(column.type) else column
                for column in batch.columns
            ]
            yield from RecordBatch.from_arrays(columns, names=batch.schema.names).to_pylist()
            num_read += batch.num_rows
            if advance is not None:
                # Columns are stored one after the other: positions in the file show no progress.
                num_now = num_bytes * num_read // file.metadata.num_rows
                advance(num_now - num_reported)
                num_reported = num_now
    if advance is not None:
        advance(num_bytes - num_reported)
