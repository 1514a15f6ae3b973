"""Examples become tensors that a model can take, whatever their lengths."""

import torch

from tests.data.conftest import example_of
from yrunner.data.collate import SlicedExamples, collate
from yrunner.tokens import IGNORE_INDEX

PAD = 7777


def test_short_examples_are_padded_on_the_right():
    batch = collate([example_of(1, 1), example_of(1, 3)], PAD)
    assert batch["input_ids"].tolist() == [[1, 2, 3, PAD, PAD], [1, 2, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    none = IGNORE_INDEX
    assert batch["labels"].tolist() == [[none, 2, none, none, none], [none, 2, 3, 4, none]]


def test_every_example_comes_back_out_of_its_row():
    examples = [example_of(context, targets) for context in (1, 4) for targets in (1, 2, 9)]
    batch = collate(examples, PAD)
    for row, example in enumerate(examples):
        kept = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][kept].tolist() == example.input_ids
        assert batch["labels"][row][kept].tolist() == example.labels
        assert set(batch["labels"][row][~kept].tolist()) <= {IGNORE_INDEX}


def test_an_empty_micro_batch_is_one_token_that_is_seen_and_not_learned():
    batch = collate([], PAD)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[PAD]],
        "attention_mask": [[1]],
        "labels": [[IGNORE_INDEX]],
    }


def test_all_tensors_are_of_long_integers_and_of_one_shape():
    for examples in ([], [example_of(1, 1)], [example_of(1, 1), example_of(3, 4)]):
        batch = collate(examples, PAD)
        assert {tensor.dtype for tensor in batch.values()} == {torch.long}
        assert len({tensor.shape for tensor in batch.values()}) == 1


def test_examples_are_asked_for_by_slice():
    examples = [example_of(1, 2), example_of(2, 5)]
    slices = SlicedExamples(examples, token_batch=2)
    assert len(slices) == 2
    assert slices[1, 2].labels == [IGNORE_INDEX] * 6 + [7]
    assert SlicedExamples(examples)[1, 0] is examples[1]
