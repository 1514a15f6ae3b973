"""Find the data files of a recipe, and read the rows of each kind of file."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from glob import escape, glob
from itertools import takewhile
from pathlib import Path
from typing import Literal

from yrunner.data.readers.json import layout_of, promises_lines, read_json
from yrunner.data.readers.tables import (
    SEPARATORS,
    read_arrow,
    read_parquet,
    read_table,
    separator_of,
    usual_separator,
)
from yrunner.data.readers.text import Advance, FileRow, is_gzipped, open_text
from yrunner.errors import DataError, Origin

Document = Literal["line", "file"]
"""Whether each line of a txt file is a document, or the whole file."""


def read_rows(
    path: Path, *, document: Document = "line", advance: Advance | None = None
) -> Iterator[FileRow]:
    """Yield the rows of a file, without ever holding the whole file in memory.

    Rows are numbered from 1: by line in txt files and in files with a JSON value per line, whose
    blank lines are skipped; by item in other json files; by record after the header in tables. A
    row that cannot be parsed, such as a
    broken line of a jsonl file, is yielded as `Damaged`, to be counted like any other invalid row.
    With `document` "file" a txt file is one row, unless it is blank.

    Raises `DataError` if the file as a whole cannot be read.
    """
    kind = kind_of(path)
    if kind is None:
        inner = path.with_suffix("") if is_gzipped(path) else path
        ending = path.name.removeprefix(inner.stem)
        reason = f"{ending} files are not supported" if ending else "has no file suffix"
        remedy = OTHER_KINDS.get(inner.suffix.lower(), f"use one of {KINDS}")
        raise DataError(path, reason, remedy=remedy.format(name=path.name))
    if kind in COLUMNAR and is_gzipped(path):
        raise DataError(
            path,
            f"a gzipped {kind[1:]} file cannot be read",
            remedy=f"decompress it: gunzip {path.name}",
        )
    try:
        _check_beginning(path, kind)
        if kind == ".txt" and document == "file":
            yield from _read_document(path, advance)
        else:
            yield from READERS[kind](path, advance)
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}") from error


def notes_on(path: Path) -> list[str]:
    """What is unusual about a file that `read_rows` can read, in words."""
    match kind_of(path):
        case ".csv" | ".tsv":
            separator = separator_of(path)
            if separator != usual_separator(path):
                return [f"fields are separated by {SEPARATORS[separator]}"]
        case ".json" | ".jsonl" | ".ndjson":
            layout = layout_of(path)
            if layout == "wrapped":
                return ["rows are the items of an array inside an object"]
            if layout == "lines" and not promises_lines(path):
                return ["one JSON value per line, numbered by line"]
            if layout == "values" and promises_lines(path):
                return ["not one JSON value per line; rows are numbered in their order"]
    return []


def _check_beginning(path: Path, kind: str) -> None:
    """Raise `DataError` if a file begins as something else than its name says."""
    with path.open("rb") as file:
        start = file.read(200).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for sign, what, remedy in BEGINNINGS:
        is_own = (
            (sign == GZIP and is_gzipped(path))
            or (sign == PARQUET and kind == ".parquet")
            or (sign in PAGES and kind == ".txt")
        )
        if start.startswith(sign) and not is_own:
            raise DataError(path, f"is {what}", remedy=remedy.format(name=path.name))


AS_TABLE = "save the table as CSV (UTF-8) or as parquet"
GZIP, PARQUET = b"\x1f\x8b", b"par1"
PAGES = (b"<!doctype html", b"<html")
BEGINNINGS = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the data itself",
        "run git lfs pull in its repository",
    ),
    *(
        (page, "an HTML page, not data", "download the file itself; on the Hub, use its raw link")
        for page in PAGES
    ),
    (GZIP, "gzip-compressed, but not named so", "rename it to {name}.gz"),
    (PARQUET, "a parquet file, but not named so", "give it the ending .parquet"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it: zstd -d -o NEW_FILE {name}"),
    (b"pk\x03\x04", "a zip archive or an Excel file", f"unpack it, or {AS_TABLE}"),
)
"""First bytes in lower case, what they are a sign of, and what to do."""


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
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".csv": read_table,
    ".tsv": read_table,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": _read_lines,
}
COLUMNAR = (".parquet", ".arrow")
KINDS = f"{', '.join(READERS)} (or .gz of any but {' and '.join(COLUMNAR)})"

OTHER_KINDS = {
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), AS_TABLE),
    **dict.fromkeys((".zst", ".zstd"), "decompress it: unzstd {name}"),
    ".bz2": "decompress it: bunzip2 {name}",
    ".xz": "decompress it: unxz {name}",
    **dict.fromkeys((".zip", ".7z", ".rar"), "unpack it, and name the files in it"),
    **dict.fromkeys((".tar", ".tgz"), "unpack it: tar -xf {name}"),
    ".md": "rename it to .txt to read each line as a text",
}
"""What to do with files of other kinds."""

DESCRIPTIONS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""Metadata beside the data: of the datasets library, and LLaMA-Factory's list of its files."""

Split = Literal["train", "validation", "test"]
SPLITS: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "训练", "训练集"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "验证", "验证集"), "validation"),
    **dict.fromkeys(("eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing", "测试", "测试集"), "test"),
}
"""Words that begin or end the name of a file or folder with one split of a data set."""
NUMBERING = ("of", "part", "shard", "data")


@dataclass(frozen=True)
class Found:
    """The data files of a path in a recipe."""

    files: tuple[Path, ...]
    others: tuple[Path, ...] = ()
    """Files of other splits, which are not used."""


def find_files(path: Path, purpose: Literal["train", "validation"] = "train") -> Found:
    """The data files of a path in a recipe (a file, a folder or a glob), sorted by name.

    A folder is searched recursively; hidden files and files of other kinds are skipped. Every match
    of a glob (`*`, `?`, `[a-z]`, `**` for any depth of folders) must be a data file. If the names
    say which split a file holds, only those that serve the purpose are used. Raises `DataError` if
    a match is not a data file, or if nothing is found.
    """
    if path.is_file():
        if path.name in DESCRIPTIONS:
            raise DataError(
                path,
                "describes data files and has no rows",
                remedy="name the folder or a data file",
            )
        return Found((path,))
    if path.is_dir():
        files = _of_folder(path)
        return _of_purpose(path, files, [file.relative_to(path) for file in files], purpose)
    files = [file for file in _matches(str(path)) if file.name not in DESCRIPTIONS]
    if not files:
        raise DataError(path, "no such file", remedy="check the path")
    for file in files:
        if kind_of(file) is None:
            raise DataError(
                file,
                f"matches {path.name} but is not a data file",
                remedy=f"narrow the glob; data files are {KINDS}",
            )
    fixed = Path(*takewhile(lambda part: not set(part) & set("*?["), path.parts))
    if split_of(path.relative_to(fixed)) is not None:
        # The glob itself names a split.
        return Found(tuple(files))
    return _of_purpose(path, files, [file.relative_to(fixed) for file in files], purpose)


def _of_folder(path: Path) -> list[Path]:
    matches = _matches(f"{escape(str(path))}/**")
    packed = [
        file for file in matches
        if file.suffix.lower() in OTHER_KINDS and kind_of(file.with_suffix("")) is not None
    ]  # fmt: skip
    if packed:
        remedy = OTHER_KINDS[packed[0].suffix.lower()].format(name=packed[0].name)
        raise DataError(packed[0], "is a compressed data file that cannot be read", remedy=remedy)
    listed = {file.parent: _listed(file) for file in matches if file.name == "state.json"}
    files = [
        file for file in matches
        if is_data_file(file) and file.name in (listed.get(file.parent) or (file.name,))
    ]  # fmt: skip
    if files:
        return files
    tables = [file for file in matches if OTHER_KINDS.get(file.suffix.lower()) == AS_TABLE]
    if tables:
        raise DataError(tables[0], f"{tables[0].suffix} files are not supported", remedy=AS_TABLE)
    raise DataError(path, "the folder has no data files", remedy=f"add one of {KINDS}")


def _listed(state: Path) -> Sequence[str]:
    """The arrow files of a saved data set: others in its folder were left when it was made."""
    try:
        return [file["filename"] for file in json.loads(state.read_text("utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError):
        # The state of something else.
        return []


def _of_purpose(path: Path, files: Sequence[Path], names: Sequence[Path], purpose: str) -> Found:
    """The files that serve the purpose: no split is used for another's, and none by accident."""
    splits = [split_of(name) for name in names]
    wanted: list[str | None]
    if purpose in splits:
        wanted = [purpose, None] if purpose == "train" else [purpose]
    elif purpose == "train":
        wanted = [None]
    elif "train" in splits:
        wanted = []
    else:
        wanted = [None] if None in splits else ["test"]
    used = tuple(file for file, split in zip(files, splits, strict=True) if split in wanted)
    others = tuple(file for file in files if file not in used)
    if not used:
        shown = ", ".join(file.name for file in others[:3])
        raise DataError(
            path,
            f"has no files to {'train on' if purpose == 'train' else 'validate on'}, only of other "
            f"splits: {shown}",
            remedy="to use them anyway, name each with file: ...",
        )
    return Found(used, others)


def split_of(name: Path) -> Split | None:
    """The split that a file has by its name inside a folder, or by the folders around it."""
    for part in reversed((*name.parts[:-1], name.name.split(".")[0])):
        words = re.findall(r"[a-z]+|[\u4e00-\u9fff]+", part.lower())
        words = [word for word in words if word not in NUMBERING]
        for word in (*words[:1], *words[-1:]):
            if word in SPLITS:
                return SPLITS[word]
    return None


def is_data_file(path: Path) -> bool:
    """Whether a file in a folder has rows, by its name."""
    return kind_of(path) is not None and path.name not in DESCRIPTIONS


def _matches(pattern: str) -> list[Path]:
    matches = sorted({Path(match) for match in glob(pattern, recursive=True)})
    return [match for match in matches if match.is_file()]
