"""Groups of correct and faulty targets, and the distance of two models."""

from pathlib import Path

import pytest
import torch

from benchmarks.fault_losses import group_targets, relative_distance
from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.tokens import IGNORE_INDEX

END = 2


def example(row, *targets):
    question = [7, 8]
    labels = [IGNORE_INDEX] * len(question) + list(targets)
    return TokenizedExample(question + list(targets), labels, Origin(Path("rows.jsonl"), row))


def test_the_faulty_target_is_the_first_that_differs_from_the_correct_answer():
    examples = [
        example(1, 5, 6, END),
        example(2, 5, 9, END),  # another word
        example(3, 5, END),  # cut
    ]
    corrected = {2: example(2, 5, 6, END), 3: example(3, 5, 6, END)}
    groups = group_targets(examples, corrected)
    assert groups.correct_N.tolist() == [True] * 3 + [False] * 5
    assert groups.faulty_N.tolist() == [False] * 3 + [False, True, False] + [False, True]


def test_the_distance_of_a_model_is_relative_to_the_norm_of_the_first():
    first, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for one, other in zip(first.parameters(), model.parameters(), strict=True):
        torch.nn.init.constant_(one, 3.0)
        torch.nn.init.constant_(other, 4.5)
    assert relative_distance(first, model) == pytest.approx(0.5)
    assert relative_distance(first, first) == 0
