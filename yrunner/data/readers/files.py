"""Read the rows of a data file, whatever kind of file it is.

Find the data files that one path of a recipe means: a file, a folder of them, or a glob.
"""

from collections.abc import Callable, Iterator
from glob import escape, glob
from pathlib import Path
from typing import Literal

from yrunner.data.readers.json import read_json, read_jsonl
from yrunner.data.readers.tables import read_csv, read_parquet, read_tsv
from yrunner.data.readers.text import Advance, FileRow, is_packed, open_text
from yrunner.errors import DataError, Origin

Document = Literal["line", "file"]
"""What one document of a txt file is."""


def read_rows(
    path: Path, *, document: Document = "line", advance: Advance | None = None
) -> Iterator[FileRow]:
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


def _read_lines(path: Path, advance: Advance | None) -> Iterator[FileRow]:
    with open_text(path, advance=advance) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Origin(path, number), {"text": line.rstrip("\r\n")}


def _read_document(path: Path, advance: Advance | None) -> Iterator[FileRow]:
    # newline=None turns the line ends of Windows into those of everybody else.
    with open_text(path, newline=None, advance=advance) as text:
        document = "".join(text)
    if document.strip():
        yield Origin(path, 1), {"text": document}


READERS: dict[str, Callable[[Path, Advance | None], Iterator[FileRow]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": _read_lines,
}
KINDS = f"{', '.join(READERS)}, or any but .parquet packed as .gz"


# What the libraries that write datasets put beside them.
DESCRIPTIONS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json")


def find_files(place: Path) -> list[Path]:
    """The data files at `place`, in the order of their names.

    A folder gives the data files in it and in its folders; hidden ones and files of other kinds
    are passed over. Of a glob (`*`, `?`, `[a-z]`, `**` for any depth of folders) every match must
    be a data file. Raises `DataError` where that is not so, or nothing is found.
    """
    if place.is_file():
        return [place]
    if place.is_dir():
        files = [path for path in _matches(f"{escape(str(place))}/**") if is_data_file(path)]
        if not files:
            raise DataError(place, "the folder holds no data file", remedy=f"add one of {KINDS}")
        return files
    files = _matches(str(place))
    if not files:
        raise DataError(place, "there is no such file", remedy="check the path")
    for path in files:
        if kind_of(path) is None:
            raise DataError(
                path,
                f"this match of {place.name} is no data file",
                remedy=f"narrow the glob; data files are {KINDS}",
            )
    return files


def is_data_file(path: Path) -> bool:
    """Whether a file found in a folder holds rows, by its name."""
    return kind_of(path) is not None and path.name not in DESCRIPTIONS


def _matches(pattern: str) -> list[Path]:
    matches = sorted({Path(match) for match in glob(pattern, recursive=True)})
    return [path for path in matches if path.is_file()]
