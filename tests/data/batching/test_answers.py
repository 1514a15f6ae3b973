"""Where each answer of a micro-batch is, whatever rows they share."""

from functools import partial
from pathlib import Path

import pytest
import torch

from yrunner.data.batching.answers import (
    OTHER,
    ComparedRows,
    RowAnswers,
    collate_answers,
    collate_with_owners,
    model_inputs,
    partners_of,
    sharing_pays,
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


PAIRS = [
    (example([5, 6, 7], [8, 9]), example([5, 6, 7], [8, 10, 11], after=[4])),
    (example([3, 3, 4, 4], [12], after=[PAD]), example([3, 3, 4, 4], [13, 14])),
    # Nothing before the token that predicts the first target; and other tokens there.
    (example([9], [15]), example([9], [16, 17])),
    (example([5, 6, 7, 8], [20]), example([5, 6, 1, 8], [21])),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_behind_one_prompt_see_what_they_see_apart(layout):
    answers = [answer for pair in PAIRS for answer in pair]
    batch = collate_with_owners(answers, PAD, layout, together=2)
    ids_BT, labels_BT = batch["input_ids"], batch["labels"]
    seen = []
    for row, column in (labels_BT != IGNORE_INDEX).nonzero().tolist():
        sees_T = batch["attention_mask"][row, 0, column - 1]
        places = batch["position_ids"][row][sees_T].tolist()
        assert sorted(places) == [*range(len(places))]
        before = dict(zip(places, ids_BT[row][sees_T].tolist(), strict=True))
        seen.append([*[before[at] for at in range(len(places))], int(labels_BT[row, column])])
    found = [[] for _ in answers]
    for owner, tokens in zip(batch["answer_N"].tolist(), seen, strict=True):
        found[owner].append(tokens)
    assert found == [
        [each.input_ids[: place + 1] for place in each.target_positions] for each in answers
    ]
    assert batch["num_targets_S"].tolist() == [len(each.target_positions) for each in answers]
    ends = ids_BT.flatten()[batch["last_S"]].tolist()
    assert ends == [9, 4, 12, 14, 15, 17, 20, 21]
    assert batch["attention_mask"].any(-1).all(), "a token that sees nothing would be NaN"


def test_each_prompt_is_computed_once_where_that_saves_enough():
    rows = [RowAnswers(pair) for pair in PAIRS]
    assert sharing_pays(rows)
    assert not sharing_pays([RowAnswers((example([9], [15]), example([9], [16])))])
    assert not sharing_pays([RowAnswers((example([5, 6, 7], [8, 9]),), is_desirable=True)])
    assert not sharing_pays([])
    answers = [answer for pair in PAIRS for answer in pair]
    once, twice = (
        int((collate_with_owners(answers, PAD, together=each)["input_ids"] != PAD).sum())
        for each in (2, 1)
    )
    assert twice - once == 2 + 3 + 0 + 2


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
