"""Memorised faults: ask for training rows with known wrong answers, and count those repeated."""

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
from yrunner.data.text_metrics import is_exact
from yrunner.errors import DataError, Origin
from yrunner.evaluation.evaluated_model import EvaluatedModel
from yrunner.evaluation.questions import Question, question_of
from yrunner.evaluation.results import Faults


@dataclass(frozen=True)
class KnownFault:
    """A training row with a wrong answer, which is the question's reference."""

    question: Question
    kind: str
    """The kind of fault in a word; empty where the list has none."""
    right: str
    """The correct answer; empty where the list has none."""


def read_faults(data: Path, listed: Path, *, thinking_apart: bool = True) -> list[KnownFault]:
    """The rows of `data` that the list gives by `row`, counted from 1, in its order.

    `thinking_apart`: the faulty answer is what comes behind its thinking.

    Raises `DataError` where a line gives no row with a question and an answer, an unreadable row,
    or a row with the right answer. Rows that are not listed are not checked.
    """
    rows = {row.origin.row: row for row in read_conversations(data).rows}
    faults = []
    for origin, line in read_rows(listed):
        named: Mapping[str, Any] = line if isinstance(line, Mapping) else {}
        question = _question_of(named.get("row"), origin, rows, data)
        if thinking_apart:
            question = question.behind_thinking()
        right = str(named.get("right", ""))
        if _is_same(right, question.reference):
            raise DataError(
                origin,
                f'its "right" answer equals the answer of row {named["row"]} of {data.name}',
                remedy="remove the line, or correct it",
            )
        faults.append(KnownFault(question, str(named.get("kind", "")), right))
    if not faults:
        raise DataError(listed, "has no rows", remedy="add rows, or remove eval.faults")
    return faults


def _question_of(
    number: Any, origin: Origin, rows: Mapping[int, Conversation | Refusal], data: Path
) -> Question:
    """The row with that number, which the line at `origin` gives, as a question."""
    # In Python, True is an integer.
    row = rows.get(number) if type(number) is int else None
    if isinstance(row, Refusal):
        raise DataError(
            row.origin, row.reason, remedy=f"correct the row, or remove {origin}, which lists it"
        )
    if row is None or row.is_text:
        given = quoted(str(number)) if number is not None else "nothing"
        raise DataError(
            origin,
            f'its "row" is {given}, not a question with an answer in {data.name}',
            remedy="give the number of the faulty row, counted from 1",
        )
    return question_of(row)


def find_memorised(
    faults: Sequence[KnownFault], model: EvaluatedModel, max_new_tokens: int
) -> Faults:
    """Ask the question of every faulty row; a model that gives the faulty answer memorised it."""
    answers = model.answer([fault.question for fault in faults], max_new_tokens)
    per_row = [
        float(_is_same(answer.text, fault.question.reference))
        for fault, answer in zip(faults, answers, strict=True)
    ]
    by_kind: dict[str, list[float]] = defaultdict(list)
    for fault, memorised in zip(faults, per_row, strict=True):
        by_kind[fault.kind].append(memorised)
    corrected = [
        is_exact(answer.text, fault.right)
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
    """Character by character: a fault may be a single letter or decimal point."""
    return one.strip() == other.strip()
