"""Micro-batches that say where each of their examples is from, for what a teacher makes of it."""

# Shapes: E = examples of a micro-batch, in the order of their targets

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.utils.data import Dataset

from yrunner.data.batching.batches import Batch, Batches
from yrunner.data.batching.collate import BatchLayout, collate, one_per_row
from yrunner.data.batching.plan import Plan
from yrunner.data.batching.token_batches import Slice, SlicedRow, cut_group
from yrunner.data.conversation import TokenizedExample
from yrunner.tokens import IGNORE_INDEX

PLACES = "places_E3"
"""Of each example: its row, its first target among those of the row, and its number of targets."""
UPDATE = "update"
"""The update of a micro-batch, counted from 0; a trial or a validation has none."""
IS_LABEL = "is_label_N"
"""Which targets are from the data; missing where all are."""


@dataclass(frozen=True)
class TaughtExample:
    """An example, or a group of its targets, and where they are among all."""

    example: TokenizedExample
    row: int
    """Counted through training rows, then validation rows."""
    first_target: int = 0
    is_written: bool = False
    """Whether the student wrote its answer: no cache knows it, and it is no label."""


class TaughtExamples(Dataset[TaughtExample]):
    """Examples by slice; `first_row` is the number of the first."""

    def __init__(
        self, examples: Sequence[TokenizedExample], token_batch: int = 0, first_row: int = 0
    ) -> None:
        self.examples, self.token_batch, self.first_row = examples, token_batch, first_row

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, one: Slice) -> TaughtExample:
        index, group = one
        example = cut_group(self.examples[index], group, self.token_batch)
        return TaughtExample(example, self.first_row + index, group * self.token_batch)

    def __getitems__(self, rows: Sequence[SlicedRow]) -> list[TaughtExample]:
        """All examples of a micro-batch, in one call of the data loader."""
        return [self[one] for row in rows for one in row]


class TaughtBatches(Batches):
    """The micro-batches of a student."""

    def __init__(
        self,
        plan: Plan,
        train: Sequence[TokenizedExample],
        validation: Sequence[TokenizedExample],
        pad_token_id: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """See `Batches`."""
        super().__init__(plan, (), (), pad_token_id, rank, num_ranks)
        self.train = TaughtExamples(train, plan.token_batch)
        self.validation = TaughtExamples(validation, first_row=len(train))

    def of_updates(self, first: int) -> Iterator[Batch]:
        """As those of `Batches`, each with the number of its update."""
        # Begun now: the data loader draws a random number, which may not be the training's.
        numbered = enumerate(super().of_updates(first))
        size = self.per_update
        return (
            batch | {UPDATE: torch.tensor(first + number // size)} for number, batch in numbered
        )

    def collate(self, examples: Sequence[TaughtExample]) -> Batch:
        """By the layout of this moment."""
        return collate_taught(examples, self.pad_token_id, self.layout)

    def examples_of(self, examples: Sequence[Any]) -> list[TokenizedExample]:
        """The examples without their places."""
        return [taught.example for taught in examples]


def collate_taught(
    taught: Sequence[TaughtExample], pad_token_id: int, layout: BatchLayout = one_per_row
) -> Batch:
    """What `collate` makes of examples, and their places; `is_label_N` if the student wrote one."""
    examples = [each.example for each in taught]
    batch = collate(examples, pad_token_id, layout)
    rows = layout([len(example.input_ids) for example in examples]) if examples else []
    # Targets come row by row, as the layout has placed their examples.
    placed = [taught[place] for place in chain.from_iterable(rows)]
    counts = [len(each.example.target_positions) for each in placed]
    places = [
        (each.row, each.first_target, count) for each, count in zip(placed, counts, strict=True)
    ]
    batch[PLACES] = torch.tensor(places, dtype=torch.long).view(-1, 3)
    if any(each.is_written for each in placed):
        is_label_E = torch.tensor([not each.is_written for each in placed])
        batch[IS_LABEL] = is_label_E.repeat_interleave(torch.tensor(counts))
    return batch


def is_drawn(seed: int, update: int, row: int, share: float) -> bool:
    """Whether the student writes the answer of a row in an update, in any number of processes."""
    return random.Random(f"on policy {seed} {update} {row}").random() < share


def with_answer(
    example: TokenizedExample, prompt: Sequence[int], answer: Sequence[int]
) -> TokenizedExample:
    """The example with another answer behind its prompt."""
    labels = [IGNORE_INDEX] * len(prompt) + list(answer)
    return TokenizedExample([*prompt, *answer], labels, example.origin)


def prompt_of_last_answer(example: TokenizedExample) -> list[int]:
    """Everything before the last answer: before the last run of targets."""
    targets = example.target_positions
    gaps = (
        place for place in range(len(targets) - 1, 0, -1) if targets[place - 1] + 1 < targets[place]
    )
    return example.input_ids[: targets[next(gaps, 0)]]
