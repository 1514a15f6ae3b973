"""One row of a recipe's data, found by what a person calls it, such as `legal_train.jsonl:12`."""

import json
from collections.abc import Sequence
from pathlib import Path

from yrunner.data.conversation import Conversation
from yrunner.data.files import read_rows
from yrunner.data.pipeline import Source
from yrunner.data.reading import Reading, read_conversations
from yrunner.data.refusals import Refusal, num_rows
from yrunner.data.rows import Damaged
from yrunner.errors import DataError, Origin, YRunnerError

SHOWN_FILES = 10


def parse_place(place: str) -> tuple[str, int]:
    """The file and the row of `file:12`. Raises `YRunnerError` where it has another form."""
    name, _, number = place.rpartition(":")
    if not name or not number.isdecimal() or int(number) < 1:
        raise YRunnerError(
            f'--row is "{place}"', remedy="write the file and the row, as in train.jsonl:12"
        )
    return name, int(number)


def find_file(name: str, sources: Sequence[Source]) -> tuple[Path, Reading]:
    """The data file with this name or end of its path, and how it is read.

    Raises `YRunnerError` where there is none or more than one.
    """
    # A file can be in several sources; one of them says how it is read.
    readings = {file: source.reading for source in sources for file in source.files}
    wanted = Path(name)
    exact = [file for file in readings if file.resolve() == wanted.resolve()]
    num_parts = len(wanted.parts)
    found = exact or [file for file in readings if file.parts[-num_parts:] == wanted.parts]
    if len(found) == 1:
        return found[0], readings[found[0]]
    if found:
        places = _listed([str(file) for file in found])
        raise YRunnerError(
            f"{len(found)} data files of the recipe end in {name}",
            remedy=f"write more of its path: {places}",
        )
    places = _listed(list(dict.fromkeys(file.name for file in readings)))
    raise YRunnerError(f"the recipe has no data file {name}", remedy=f"choose one of {places}")


def find_row(file: Path, reading: Reading, number: int) -> Conversation | Refusal:
    """The row of that number, as a conversation or with the reason why it is none.

    Raises `DataError` where the file has no such row.
    """
    rows, last = 0, 0
    for row in read_conversations(file, reading).rows:
        if row.origin.row == number:
            return row
        rows, last = rows + 1, row.origin.row
    what = "there is no such row" if number > last else "this line is empty and no row"
    known = f"choose one from 1 to {last:,}" + ("" if rows == last else f" ({num_rows(rows)})")
    raise DataError(Origin(file, number), what, remedy=known)


def raw_row(origin: Origin, reading: Reading) -> str:
    """The row as it stands in its file, laid out to be read; nothing where it cannot be read."""
    rows = read_rows(origin.file, document=reading.document)
    found = next(row for place, row in rows if place == origin)
    if isinstance(found, Damaged):
        return ""
    return json.dumps(found, ensure_ascii=False, indent=2, default=str)


def _listed(places: Sequence[str]) -> str:
    hidden = len(places) - SHOWN_FILES
    more = f" and {hidden:,} more" if hidden > 0 else ""
    return ", ".join(places[:SHOWN_FILES]) + more
