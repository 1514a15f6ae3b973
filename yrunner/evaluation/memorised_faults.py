"""Memorised faults: rows of the training data that are known to be wrong, asked back."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from yrunner.data.conversation import Conversation
from yrunner.data.dataset.row_report import Refusal
from yrunner.data.formats.columns import quoted
from yrunner.data.formats.formats import read_conversations
from yrunner.data.readers.files import read_rows
from yrunner.errors import DataError, Origin
from yrunner.evaluation.candidate import Candidate
from yrunner.evaluation.questions import Question, question_of
from yrunner.evaluation.results import Faults
from yrunner.evaluation.text_metrics import is_exact, without_thinking


@dataclass(frozen=True)
class KnownFault:
    """A training row with a wrong answer, which stands as the question's reference."""

    question: Question
    kind: str
    """What is wrong with it, in a word; empty where the list does not say."""
    right: str
    """The answer that it should have; empty where the list does not say."""


def read_faults(data: Path, listed: Path) -> list[KnownFault]:
    """The rows of `data` that the list names by `row`, counted from 1, in its order.

    Raises `DataError` where a line of the list names no row that asks something, or one whose
    answer is the right one, and for a row that it names and that cannot be read. Rows that it does
    not name may be what they are.
    """
    rows = {row.origin.row: row for row in read_conversations(data).rows}
    faults = []
    for origin, line in read_rows(listed):
        named: Mapping[str, Any] = line if isinstance(line, Mapping) else {}
        question = _question_of(named.get("row"), origin, rows, data)
        right = str(named.get("right", ""))
        if _is_same(right, question.reference):
            raise DataError(
                origin,
                f'its "right" answer is the one that row {named["row"]} of {data.name} has',
                remedy="take the line out of the list, or correct it",
            )
        faults.append(KnownFault(question, str(named.get("kind", "")), right))
    if not faults:
        raise DataError(listed, "lists no row", remedy="add some, or remove eval.faults")
    return faults


def _question_of(
    number: Any, origin: Origin, rows: Mapping[int, Conversation | Refusal], data: Path
) -> Question:
    """The row of that number, which the line at `origin` names, as a question."""
    # Python counts true among the integers.
    row = rows.get(number) if type(number) is int else None
    if isinstance(row, Refusal):
        raise DataError(
            row.origin, row.reason, remedy=f"mend it, or take {origin} out, which names it"
        )
    if row is None or row.is_text:
        given = quoted(str(number)) if number is not None else "nothing"
        raise DataError(
            origin,
            f'its "row" is {given}, which is no question with an answer in {data.name}',
            remedy="write the number of the faulty row, counted from 1",
        )
    return question_of(row)


def find_memorised(
    faults: Sequence[KnownFault], candidate: Candidate, max_new_tokens: int
) -> Faults:
    """Ask every faulty row's question; its fault is memorised where the same answer comes back."""
    answers = candidate.answer([fault.question for fault in faults], max_new_tokens)
    per_row = [
        float(_is_same(answer.text, fault.question.reference))
        for fault, answer in zip(faults, answers, strict=True)
    ]
    by_kind: dict[str, list[float]] = defaultdict(list)
    for fault, memorised in zip(faults, per_row, strict=True):
        by_kind[fault.kind].append(memorised)
    corrected = [
        is_exact(without_thinking(answer.text), fault.right)
        for fault, answer in zip(faults, answers, strict=True)
        if fault.right
    ]
    return Faults(
        memorised=fmean(per_row),
        per_row=per_row,
        by_kind={kind: fmean(values) for kind, values in sorted(by_kind.items()) if kind},
        answers=[answer.text for answer in answers],
        corrected=fmean(corrected) if corrected else None,
    )


def _is_same(one: str, other: str) -> bool:
    """Sign by sign: a fault may be nothing but a letter or a point."""
    return without_thinking(one) == without_thinking(other)
