"""Training rows that are known to be wrong, and whether a model now says what they say."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yrunner.data.conversation import Conversation
from yrunner.data.files import read_rows
from yrunner.data.reading import read_conversations
from yrunner.errors import DataError, Origin
from yrunner.evaluation.tasks import Question, question_of

FAULT_REMEDY = 'write {"row": 12, "kind": "typos", "right": "the answer as it should be"}'


@dataclass(frozen=True)
class Fault:
    """A faulty row: its question with the wrong answer that was learned from, and the right one."""

    question: Question
    right: str
    kind: str


def read_faults(file: Path, data: Path) -> list[Fault]:
    """The faults that `file` lists, of which each names a row of `data`.

    Raises `DataError` for a line that is no fault, and for a row that is not there, cannot be
    used or holds no question with an answer.
    """
    rows = {row.origin.row: row for row in read_conversations(data).rows}
    faults = []
    for origin, line in read_rows(file):
        number, right, kind = _read_line(origin, line)
        row = rows.get(number)
        if not isinstance(row, Conversation) or row.is_text:
            raise DataError(
                origin,
                f"row {number} of {data.name} is no question with an answer",
                remedy="count its rows from 1",
            )
        faults.append(Fault(question_of(row), right, kind))
    if not faults:
        raise DataError(file, "lists no faults", remedy=FAULT_REMEDY)
    return faults


def _read_line(origin: Origin, line: Any) -> tuple[int, str, str]:
    values = line if isinstance(line, Mapping) else {}
    number, right, kind = (values.get(key) for key in ("row", "right", "kind"))
    # Python counts true among the integers.
    if not isinstance(number, int) or isinstance(number, bool):
        raise DataError(origin, '"row" is no whole number', remedy=FAULT_REMEDY)
    if not isinstance(right, str) or not isinstance(kind, str):
        raise DataError(origin, '"right" and "kind" must be text', remedy=FAULT_REMEDY)
    return number, right, kind
