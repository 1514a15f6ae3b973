"""Examples become tensors that a model can take, whatever their lengths and their layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.data.conftest import example_of
from yrunner.data.batching.collate import (
    SlicedExamples,
    all_in_one_row,
    choose_layout,
    collate,
    one_per_row,
)
from yrunner.tokens import IGNORE_INDEX

PAD = 7777
NONE = IGNORE_INDEX
LAYOUTS = {
    "one_per_row": one_per_row,
    "all_in_one_row": all_in_one_row,
    "fitted": choose_layout("sdpa", hidden_size=8, isolates=True),
}


def test_short_examples_are_padded_on_the_right():
    batch = collate([example_of(1, 1), example_of(1, 3)], PAD)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3, PAD, PAD], [1, 2, 3, 4, 5]],
        "labels": [[NONE, 2, NONE, NONE, NONE], [NONE, 2, 3, 4, NONE]],
    }


def test_positions_restart_at_every_example_of_a_row_and_at_every_pad():
    examples = [example_of(1, 1), example_of(1, 3), example_of(2, 3)]
    batch = collate(examples, PAD, lambda lengths: [[0, 1], [2]])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, PAD, PAD]],
        "labels": [
            [NONE, 2, NONE, NONE, 2, 3, 4, NONE],
            [NONE, NONE, 3, 4, 5, NONE, NONE, NONE],
        ],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 0]],
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_every_example_comes_back_out_of_its_row(layout, sizes):
    examples = [example_of(context, targets) for context, targets in sizes]
    batch = collate(examples, PAD, LAYOUTS[layout])
    found = []
    rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    # Every example begins with id 1, and no other token of it is 1.
    for row in rows:
        for token, label in zip(*row, strict=True):
            if token == 1:
                found.append(([], []))
            if token == PAD:
                assert label == NONE
            else:
                found[-1][0].append(token)
                found[-1][1].append(label)
    assert sorted(found) == sorted((it.input_ids, it.labels) for it in examples)


def test_one_behind_the_other_nothing_is_padded():
    batch = collate([example_of(1, 1), example_of(1, 3), example_of(1, 2)], PAD, all_in_one_row)
    assert batch["input_ids"].shape == (1, 12)
    assert PAD not in batch["input_ids"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_micro_batch_is_one_token_that_is_not_learned(layout):
    batch = collate([], PAD, LAYOUTS[layout])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[PAD]],
        "labels": [[NONE]],
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_tensors_are_of_long_integers_and_of_one_shape(layout):
    for examples in ([], [example_of(1, 1)], [example_of(1, 1), example_of(3, 4)]):
        batch = collate(examples, PAD, LAYOUTS[layout])
        assert {tensor.dtype for tensor in batch.values()} == {torch.long}
        assert len({tensor.shape for tensor in batch.values()}) == 1


def test_examples_are_asked_for_by_slice():
    examples = [example_of(1, 2), example_of(2, 5)]
    slices = SlicedExamples(examples, token_batch=2)
    assert len(slices) == 2
    assert slices[1, 2].labels == [IGNORE_INDEX] * 6 + [7]
    assert SlicedExamples(examples)[1, 0] is examples[1]


def test_a_data_loader_hands_on_the_examples_of_every_row():
    examples = [example_of(1, number) for number in range(1, 6)]
    rows = [[((4, 0), (1, 0)), ((0, 0),)], [], [((2, 0),)]]
    batches = DataLoader(SlicedExamples(examples), batch_sampler=rows, collate_fn=list)
    assert list(batches) == [[examples[4], examples[1], examples[0]], [], [examples[2]]]
