"""Read the rows of a data file, whatever kind of file it is."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from yrunner.data.json_files import read_json, read_jsonl
from yrunner.data.rows import Advance, Row
from yrunner.data.table_files import read_csv, read_parquet, read_tsv
from yrunner.data.text_files import is_packed, open_text
from yrunner.errors import DataError, Origin

Document = Literal["line", "file"]
"""What one document of a txt file is."""


def read_rows(
    path: Path, *, document: Document = "line", advance: Advance | None = None
) -> Iterator[Row]:
    """Yield every row of `path` with its number, counted from 1; never hold the whole file.

    The number is that of the line in jsonl and txt files, where empty lines hold no row, that of
    the item in json files, and that of the record after the header in tables. A row that cannot be
    read at all (a broken line of a jsonl file) is yielded as a `Damaged`, so that it is counted
    like any other faulty row. With `document` "file" a txt file is one row, if it is not blank.
    `advance` is told the bytes read, which in the end sum up to the size of the file on the disk.
    Raises `DataError` where the file itself cannot be read.
    """
    kind = kind_of(path)
    if kind is None:
        ending = f'files of kind "{path.suffix}"' if path.suffix else "files without an ending"
        raise DataError(path, f"{ending} cannot be read", remedy=f"use one of {KINDS}")
    if kind == ".parquet" and is_packed(path):
        raise DataError(
            path,
            "parquet files are packed inside, and cannot be read from a gzip file",
            remedy=f"unpack it: gunzip {path.name}",
        )
    try:
        if kind == ".txt" and document == "file":
            yield from _read_document(path, advance)
        else:
            yield from READERS[kind](path, advance)
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}") from error


def kind_of(path: Path) -> str | None:
    """The ending that says how a file is read, without `.gz`; None for files of other kinds."""
    name = path.with_suffix("") if is_packed(path) else path
    kind = name.suffix.lower()
    return kind if kind in READERS else None


def _read_lines(path: Path, advance: Advance | None) -> Iterator[Row]:
    with open_text(path, advance=advance) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Origin(path, number), {"text": line.rstrip("\r\n")}


def _read_document(path: Path, advance: Advance | None) -> Iterator[Row]:
    # newline=None turns the line ends of Windows into those of everybody else.
    with open_text(path, newline=None, advance=advance) as text:
        document = "".join(text)
    if document.strip():
        yield Origin(path, 1), {"text": document}


READERS: dict[str, Callable[[Path, Advance | None], Iterator[Row]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": _read_lines,
}
KINDS = f"{', '.join(READERS)}, or any but .parquet packed as .gz"
