"""Corrupt rows and pairs of every format and file type; each is kept, or rejected by row number."""

import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.faults.cases import Case
from tests.data.conftest import tokenizer_of
from tests.data.damage import (
    NOT_IN_TABLES,
    PAIRS,
    as_bytes,
    check_conversation,
    damaged,
    sound_rows,
)
from yrunner.data.conversation import RatedExample, TokenizedExample, TokenizedPair
from yrunner.data.dataset.cache import Cache
from yrunner.data.dataset.prepare import Rules, Source, prepare
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


def pair_cases(num_rows: int, generator: random.Random) -> Iterator[Case]:
    """Make a case for each file type and form of a pair or mark, tokenized as for training."""
    forms = [
        (kind, form)
        for kind in READERS
        for form in PAIRS
        if kind != ".txt" and not (kind in (".csv", ".tsv") and form in NOT_IN_TABLES)
    ]
    rows_each = -(-num_rows // len(forms))
    for kind, form in forms:
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"rows{kind}"
            _, row = PAIRS[form]
            rows = [damaged(row, generator) for _ in range(rows_each)]
            # Most rows are sound: a file of damaged ones may be refused as a whole.
            path.write_bytes(as_bytes([*rows, *[row] * (rows_each + 1)], kind, form))
            yield _prepare(path, form, rows_each)


def _prepare(path: Path, form: str, num_damaged: int) -> Case:
    kept = rejected = 0
    try:
        rules = Rules(
            max_length=64, too_long="cut", rows="ratings" if form.startswith("kto") else "pairs"
        )
        tokenizer = tokenizer_of("scratch")
        prepared = prepare([Source((path,))], tokenizer, rules, Cache(path.parent / "cache"))
        (report,) = prepared.reports
        refused = {refusal.origin.row for refusal in report.refusals}
        rows = [prepared.train.origin(number).row for number in range(len(prepared.train))]
        lost = []
        if sorted({*rows, *refused}) != list(range(1, 2 * num_damaged + 2)) or refused & {*rows}:
            lost.append("a row has disappeared")
        if any(row > num_damaged for row in refused):
            lost.append("a sound row is rejected")
        lost += [problem for item in prepared.train for problem in _problems(item)]
        rejected = len(refused)
        kept = num_damaged - rejected
        outcome = f"{kept:,} of {num_damaged:,} rows kept, {rejected:,} rejected"
    except Exception as error:  # noqa: BLE001  any error is a loss
        outcome, lost = "raised", [repr(error)]
    return Case("corrupt pairs", f"{path.suffix} {form}", outcome, tuple(lost))


def _problems(item: TokenizedPair | RatedExample) -> Iterator[str]:
    answers: list[TokenizedExample] = []
    match item:
        case TokenizedPair():
            answers = [item.chosen, item.rejected]
            if item.chosen.input_ids == item.rejected.input_ids:
                yield f"{item.chosen.origin}: equal answers are kept"
            if item.chosen.origin != item.rejected.origin:
                yield f"{item.chosen.origin}: the answers are of different rows"
        case RatedExample():
            answers = [item.example]
    for answer in answers:
        if not answer.target_positions:
            yield f"{answer.origin}: nothing is learned"
