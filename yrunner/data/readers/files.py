"""Find the data files of a recipe, and read the rows of each kind of file."""

from collections.abc import Callable, Iterator
from glob import escape, glob
from pathlib import Path
from typing import Literal

from yrunner.data.readers.json import read_json, read_jsonl
from yrunner.data.readers.tables import read_csv, read_parquet, read_tsv
from yrunner.data.readers.text import Advance, FileRow, is_gzipped, open_text
from yrunner.errors import DataError, Origin

Document = Literal["line", "file"]
"""Whether each line of a txt file is a document, or the whole file."""


def read_rows(
    path: Path, *, document: Document = "line", advance: Advance | None = None
) -> Iterator[FileRow]:
    """Yield the rows of a file, without ever holding the whole file in memory.

    Rows are numbered from 1: by line in jsonl and txt files, whose blank lines are skipped; by item
    in json files; by record after the header in tables. A row that cannot be parsed, such as a
    broken line of a jsonl file, is yielded as `Damaged`, to be counted like any other invalid row.
    With `document` "file" a txt file is one row, unless it is blank.

    Raises `DataError` if the file as a whole cannot be read.
    """
    kind = kind_of(path)
    if kind is None:
        reason = f"{path.suffix} files are not supported" if path.suffix else "has no file suffix"
        raise DataError(path, reason, remedy=f"use one of {KINDS}")
    if kind == ".parquet" and is_gzipped(path):
        raise DataError(
            path,
            "a gzipped parquet file cannot be read",
            remedy=f"decompress it: gunzip {path.name}",
        )
    try:
        if kind == ".txt" and document == "file":
            yield from _read_document(path, advance)
        else:
            yield from READERS[kind](path, advance)
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}") from error


def kind_of(path: Path) -> str | None:
    """The suffix that decides how a file is read, before any `.gz`; None for other files."""
    name = path.with_suffix("") if is_gzipped(path) else path
    kind = name.suffix.lower()
    return kind if kind in READERS else None


def _read_lines(path: Path, advance: Advance | None) -> Iterator[FileRow]:
    with open_text(path, advance=advance) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Origin(path, number), {"text": line.rstrip("\r\n")}


def _read_document(path: Path, advance: Advance | None) -> Iterator[FileRow]:
    # newline=None turns Windows line ends into line feeds.
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
KINDS = f"{', '.join(READERS)} (or .gz of any but .parquet)"


# Metadata that the datasets library writes beside the data.
DESCRIPTIONS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json")


def find_files(path: Path) -> list[Path]:
    """The data files of a path in a recipe (a file, a folder or a glob), sorted by name.

    A folder is searched recursively; hidden files and files of other kinds are skipped. Every match
    of a glob (`*`, `?`, `[a-z]`, `**` for any depth of folders) must be a data file. Raises
    `DataError` if one is not, or if nothing is found.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [file for file in _matches(f"{escape(str(path))}/**") if is_data_file(file)]
        if not files:
            raise DataError(path, "the folder has no data files", remedy=f"add one of {KINDS}")
        return files
    files = _matches(str(path))
    if not files:
        raise DataError(path, "no such file", remedy="check the path")
    for file in files:
        if kind_of(file) is None:
            raise DataError(
                file,
                f"matches {path.name} but is not a data file",
                remedy=f"narrow the glob; data files are {KINDS}",
            )
    return files


def is_data_file(path: Path) -> bool:
    """Whether a file in a folder has rows, by its name."""
    return kind_of(path) is not None and path.name not in DESCRIPTIONS


def _matches(pattern: str) -> list[Path]:
    matches = sorted({Path(match) for match in glob(pattern, recursive=True)})
    return [match for match in matches if match.is_file()]
