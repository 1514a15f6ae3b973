"""Which targets are right and which faulty, and how far a model has moved."""

from pathlib import Path

import pytest
import torch

from benchmarks.fault_losses import group_targets, moved
from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.tokens import IGNORE_INDEX

END = 2


def example(row, *targets):
    question = [7, 8]
    labels = [IGNORE_INDEX] * len(question) + list(targets)
    return TokenizedExample(question + list(targets), labels, Origin(Path("rows.jsonl"), row))


def test_a_faulty_row_is_faulty_where_it_departs_from_the_right_answer():
    examples = [
        example(1, 5, 6, END),
        example(2, 5, 9, END),  # another word
        example(3, 5, END),  # cut
    ]
    mended = {2: example(2, 5, 6, END), 3: example(3, 5, 6, END)}
    groups = group_targets(examples, mended)
    assert groups.right_N.tolist() == [True] * 3 + [False] * 5
    assert groups.faulty_N.tolist() == [False] * 3 + [False, True, False] + [False, True]


def test_a_model_has_moved_by_its_distance_over_the_length_of_the_first():
    first, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for one, other in zip(first.parameters(), model.parameters(), strict=True):
        torch.nn.init.constant_(one, 3.0)
        torch.nn.init.constant_(other, 4.5)
    assert moved(first, model) == pytest.approx(0.5)
    assert moved(first, first) == 0
