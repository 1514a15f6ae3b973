"""Where each answer of a micro-batch is, whatever rows they share."""

from functools import partial
from pathlib import Path

import pytest
import torch

from yrunner.data.batching.answers import (
    OTHER,
    ComparedRows,
    collate_answers,
    collate_with_owners,
    model_inputs,
    partners_of,
)
from yrunner.data.batching.collate import all_in_one_row, fit_rows, one_per_row
from yrunner.data.conversation import RatedExample, TokenizedExample, TokenizedPair
from yrunner.errors import Origin
from yrunner.tokens import IGNORE_INDEX

PAD = 0
LAYOUTS = [one_per_row, all_in_one_row, partial(fit_rows, hidden_size=8)]


def example(prompt, answer, after=()):
    ids = [*prompt, *answer, *after]
    labels = [IGNORE_INDEX] * len(prompt) + [*answer] + [IGNORE_INDEX] * len(after)
    return TokenizedExample(ids, labels, Origin(Path("rows"), 1))


EXAMPLES = [
    example([5, 6, 7], [8, 9]),
    example([5], [10, 11, 12, 13], after=[4]),
    example([6, 6], [14], after=[PAD, PAD]),
    example([7, 8], [PAD, PAD]),
    example([9], [15, 16, 17, 18, 19, 20, 21]),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_target_knows_its_answer_and_every_answer_its_end(layout):
    batch = collate_with_owners(EXAMPLES, PAD, layout)
    labels_BT, ids = batch["labels"][:, 1:], batch["input_ids"].flatten().tolist()
    found = [[] for _ in EXAMPLES]
    targets = labels_BT[labels_BT != IGNORE_INDEX].tolist()
    for owner, target in zip(batch["answer_N"].tolist(), targets, strict=True):
        found[owner].append(target)
    answers = [[each.labels[at] for at in each.target_positions] for each in EXAMPLES]
    assert found == answers
    assert batch["num_targets_S"].tolist() == [len(answer) for answer in answers]
    # The last token that is no padding, as the classifiers of transformers find it.
    assert [ids[place] for place in batch["last_S"].tolist()] == [9, 4, 14, 8, 21]


@pytest.mark.parametrize("rated", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_an_empty_micro_batch_has_the_same_names_as_others(rated, known):
    rows = [RatedExample(EXAMPLES[0], True), RatedExample(EXAMPLES[1], False)]
    if not rated:
        rows = [TokenizedPair(*EXAMPLES[:2])]
    compared = ComparedRows(rows, rated=rated)
    if known:
        compared.reference_RA = torch.ones(len(rows), 2, dtype=torch.float64)
    full, empty = (
        collate_answers(items, PAD, one_per_row, rated=rated, known=known)
        for items in ([compared[number, 0] for number in range(len(rows))], [])
    )
    assert full.keys() == empty.keys()
    assert (OTHER + "input_ids" in full) == rated == ("is_desirable_S" in full)
    assert ("reference_S" in full) == known
    assert len(empty["answer_N"]) == len(empty["num_targets_S"]) == 0
    assert set(model_inputs(full)) == {"input_ids", "labels"}


@pytest.mark.parametrize(
    ("prompts", "partners"),
    [
        ([1, 2, 3], [2, 0, 1]),
        ([1, 1, 2, 2], [3, 3, 1, 1]),
        ([1, 2, 2, 1], [2, 0, 0, 2]),
        ([1, 1, 1], [2, 0, 1]),
        ([1], [0]),
    ],
)
def test_the_partner_is_the_last_row_before_with_another_prompt(prompts, partners):
    assert partners_of(prompts) == partners
