"""Corrupt rows of every format and file type; each must be kept, or rejected by row number."""

import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.faults.cases import Case
from tests.data.damage import as_bytes, check_conversation, damaged, sound_rows
from yrunner.data.dataset.row_report import Refusal
from yrunner.data.formats.formats import FORMATS, Reading, read_conversations
from yrunner.data.readers.files import READERS


def row_cases(num_rows: int, generator: random.Random) -> Iterator[Case]:
    """Make a case for each file type and format, with at least `num_rows` rows in all."""
    pairs = [(kind, format_name) for kind in READERS for format_name in FORMATS]
    rows_each = -(-num_rows // len(pairs))
    with TemporaryDirectory() as folder:
        for kind, format_name in pairs:
            path = Path(folder) / f"rows{kind}"
            sound = sound_rows(format_name)
            rows = [damaged(sound[index % len(sound)], generator) for index in range(rows_each)]
            path.write_bytes(as_bytes(rows, kind, format_name))
            yield _read(path, format_name, rows_each)


def _read(path: Path, format_name: str, num_rows: int) -> Case:
    try:
        rows = list(read_conversations(path, Reading(format=format_name)).rows)
        lost = []
        if [row.origin.row for row in rows] != list(range(1, num_rows + 1)):
            lost.append("a row has disappeared")
        rejected = 0
        for row in rows:
            if isinstance(row, Refusal):
                rejected += 1
            else:
                check_conversation(row)
        outcome = f"{num_rows - rejected:,} of {num_rows:,} rows kept, {rejected:,} rejected"
    except Exception as error:  # noqa: BLE001  any error is a loss
        outcome, lost = "raised", [repr(error)]
    return Case("corrupt rows", f"{path.suffix} {format_name}", outcome, tuple(lost))
