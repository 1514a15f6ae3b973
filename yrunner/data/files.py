"""Read the rows of a data file, whatever kind of file it is."""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from yrunner.errors import DataError, Origin

Row = tuple[Origin, Any]
"""A row as it stands in the file (a mapping, where the file is sound), and its place."""

# Python refuses numbers of over 4,300 digits with a plain ValueError.
JSON_ERRORS = (ValueError, RecursionError)


def read_rows(path: Path) -> Iterator[Row]:
    """Yield every row of `path` with its number, counted from 1.

    The number is that of the line in jsonl and txt files, where empty lines hold no row, and that
    of the record after the header in csv files. A row that cannot be read at all (a broken line of
    a jsonl file) is yielded as a `Damaged`, so that it is counted like any other faulty row. Raises
    `DataError` where the file itself cannot be read.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        kind = f'files of kind "{path.suffix}"' if path.suffix else "files without an ending"
        raise DataError(path, f"{kind} cannot be read", remedy=f"use one of {', '.join(READERS)}")
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}") from error


class Damaged(str):
    """The reason why a row could not be read."""

    __slots__ = ()


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    try:
        # utf-8-sig also reads files without the byte order mark that some editors put in front.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind the mark.
        place = error.start + len(content) - len(error.object)
        line = content[:place].count(b"\n") + 1
        raise DataError(
            path,
            f"line {line}: byte {place + 1} of the file (0x{content[place]:02x}) is not UTF-8",
            remedy="save the file as UTF-8",
        ) from error


def _read_json(path: Path) -> Iterator[Row]:
    text = _read_text(path)
    if not text.strip():
        return
    try:
        document = json.loads(text)
    except JSON_ERRORS as error:
        raise DataError(
            path,
            _json_fault(error),
            remedy="mend it there, or name the file .jsonl if it has one object a line",
        ) from error
    rows = document if isinstance(document, list) else [document]
    for number, row in enumerate(rows, start=1):
        yield Origin(path, number), row


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except JSON_ERRORS as error:
            row = Damaged(_json_fault(error, in_line=True))
        yield Origin(path, number), row


def _json_fault(error: ValueError | RecursionError, *, in_line: bool = False) -> str:
    """What is wrong, and where as far as the parser says so."""
    match error:
        case json.JSONDecodeError():
            line = "" if in_line else f"line {error.lineno} "
            return f"not JSON: {error.msg} at {line}column {error.colno}"
        case RecursionError():
            return "its lists and objects are nested too deeply"
        case _:
            return "holds a number with too many digits"


def _read_csv(path: Path) -> Iterator[Row]:
    text = _read_text(path)
    # The csv module has one limit for all readers, and it is shorter than a long document.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    # newline="" leaves line ends inside quoted fields to the csv module.
    records = csv.reader(io.StringIO(text, newline=""), strict=True)
    number = 0
    try:
        header = next((record for record in records if record), [])
        _check_header(path, header)
        for number, record in enumerate(filter(None, records), start=1):
            if len(record) == len(header):
                yield Origin(path, number), dict(zip(header, record, strict=True))
            else:
                reason = f"number of fields is {len(record)}, in the header it is {len(header)}"
                yield Origin(path, number), Damaged(reason)
    except csv.Error as error:
        raise DataError(
            Origin(path, number + 1),
            f"not CSV: {error} (line {records.line_num})",
            remedy='put "quotes" around fields with commas or line ends, and double quotes in them',
        ) from error


def _check_header(path: Path, header: list[str]) -> None:
    twice = [name for name, times in Counter(header).items() if times > 1]
    if twice:
        raise DataError(path, f'the header names "{twice[0]}" twice', remedy="rename one of them")


def _read_parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, RecordBatch, string, types
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with path.open("rb") as handle, ParquetFile(handle) as file:
            _check_header(path, file.schema_arrow.names)
            for batch in file.iter_batches():
                # Python's own dates know neither nanoseconds nor far years.
                columns = [
                    column.cast(string()) if types.is_temporal(column.type) else column
                    for column in batch.columns
                ]
                batch = RecordBatch.from_arrays(columns, names=batch.schema.names)
                for row in batch.to_pylist():
                    number += 1
                    yield Origin(path, number), row
    except UnicodeDecodeError as error:
        raise DataError(
            path,
            f"a text behind row {number} is not UTF-8",
            remedy="write the file anew from UTF-8 texts",
        ) from error
    # Damage shows as any of these: pyarrow's own, and Python's where a value has no like in Python.
    except (ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(
            path, f"not a whole parquet file: {reason}", remedy="write or download it anew"
        ) from error


def _read_txt(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            yield Origin(path, number), {"text": line.rstrip("\r")}


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
