"""Marks that a person set on the page of a sort: rows to keep or to drop, whatever their score."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from yrunner.commands.sort.corpus import CorpusRow
from yrunner.console import counted
from yrunner.data.dataset.examples import Column, Examples
from yrunner.data.formats.columns import quoted
from yrunner.data.readers.files import read_rows
from yrunner.data.readers.text import Damaged
from yrunner.errors import DataError, Origin
from yrunner.scoring.order import Mark

SORT_AGAIN = "mark the rows on the page of this sort, and save the marks again"


def content_of(contents_E: Column, places: Iterable[int]) -> str:
    """The hash of the text of examples in hexadecimal digits, by which a mark knows its row.

    Of both answers of a pair, in their order; of an example alone otherwise. `contents_E`: that
    column of all examples.
    """
    return "".join(f"{int(contents_E[place]):016x}" for place in places)


def read_marks(
    path: Path | None, rows: Sequence[CorpusRow], examples: Examples, names: Sequence[str]
) -> dict[int, Mark]:
    """The mark of each marked row, by the index of the row; empty without a file.

    `names`: of each training file, see `file_names`. Raises `DataError` where a line names no row
    of the corpus, or one whose text has changed since.
    """
    if path is None:
        return {}
    index_of = {
        (names[file], str(number)): index
        for index, (file, number) in enumerate(row.place for row in rows)
    }
    contents_E = examples.column("contents")
    marks: dict[int, Mark] = {}
    for origin, line in read_rows(path):
        if isinstance(line, Damaged):
            raise DataError(origin, str(line), remedy=SORT_AGAIN)
        named: Mapping[str, Any] = line if isinstance(line, Mapping) else {}
        mark = _mark_of(named, origin)
        file, number = str(named.get("file")), str(named.get("row"))
        index = index_of.get((file, number))
        if index is None:
            raise DataError(
                origin,
                f'"file" and "row" are {quoted(file)} and {quoted(number)}, not one of the '
                f"{counted(len(rows), 'row')} to sort",
                remedy=SORT_AGAIN,
            )
        parts = rows[index].examples
        known = {content_of(contents_E, parts), *(content_of(contents_E, [it]) for it in parts)}
        if named.get("content") not in known:
            raise DataError(
                origin,
                f"row {number} of {file} has another text than when it was marked",
                remedy=SORT_AGAIN,
            )
        if marks.setdefault(index, mark) != mark:
            raise DataError(
                origin,
                f"row {number} of {file} is marked both keep and drop",
                remedy="remove one of the two lines",
            )
    return marks


def _mark_of(named: Mapping[str, Any], origin: Origin) -> Mark:
    mark = named.get("mark")
    if mark not in get_args(Mark):
        given = "missing" if mark is None else quoted(str(mark))
        raise DataError(origin, f'"mark" is {given}', remedy='write "keep" or "drop"')
    return cast(Mark, mark)


def file_names(files: Sequence[Path]) -> list[str]:
    """Display name of each file: its name, or its path if two share the name."""
    names = [path.name for path in dict.fromkeys(files)]
    return [path.name if names.count(path.name) == 1 else str(path) for path in files]
