"""Rows spoilt at random, in every format and kind of file: each is kept, or refused by place."""

import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.fault_campaign.cases import Case
from tests.data.damage import as_bytes, check_conversation, damaged, sound_rows
from yrunner.data.dataset.row_report import Refusal
from yrunner.data.formats.formats import FORMATS, Reading, read_conversations
from yrunner.data.readers.files import READERS


def row_cases(number: int, chance: random.Random) -> Iterator[Case]:
    """A case for each kind of file and format; together they have at least so many rows."""
    pairs = [(kind, format_name) for kind in READERS for format_name in FORMATS]
    each = -(-number // len(pairs))
    with TemporaryDirectory() as folder:
        for kind, format_name in pairs:
            path = Path(folder) / f"rows{kind}"
            sound = sound_rows(format_name)
            rows = [damaged(sound[index % len(sound)], chance) for index in range(each)]
            path.write_bytes(as_bytes(rows, kind, format_name))
            yield _read(path, format_name, each)


def _read(path: Path, format_name: str, number: int) -> Case:
    try:
        fates = list(read_conversations(path, Reading(format=format_name)).rows)
        lost = []
        if [fate.origin.row for fate in fates] != list(range(1, number + 1)):
            lost.append("a row has disappeared")
        refused = 0
        for fate in fates:
            if isinstance(fate, Refusal):
                refused += 1
            else:
                check_conversation(fate)
        what = f"{number - refused:,} of {number:,} rows kept, {refused:,} refused"
    except Exception as error:  # noqa: BLE001  what must not come
        what, lost = "raised", [repr(error)]
    return Case("spoilt rows", f"{path.suffix} {format_name}", what, tuple(lost))
