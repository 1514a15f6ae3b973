"""The micro-batches of one process: those of a `Plan`, and those of a validation."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from yrunner.data.batching.collate import BatchLayout, SlicedExamples, collate, one_per_row
from yrunner.data.batching.plan import Plan
from yrunner.data.batching.token_batches import SlicedRow
from yrunner.data.conversation import TokenizedExample

Batch = dict[str, Tensor]


class Batches:
    """Examples, and how they become micro-batches; see `collate`."""

    def __init__(
        self,
        plan: Plan,
        train: Sequence[TokenizedExample],
        validation: Sequence[TokenizedExample],
        pad_token_id: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """`rank`: the number of this process among those that learn together."""
        self.plan = plan
        self.rank, self.num_ranks = rank, num_ranks
        self.train: Any = SlicedExamples(train, plan.token_batch)
        self.validation: Any = SlicedExamples(validation)
        self.pad_token_id = pad_token_id
        self.layout: BatchLayout = one_per_row
        """One example per row, unless the assembly chooses another layout."""

    @property
    def validates(self) -> bool:
        """Whether there is anything to validate with."""
        return len(self.validation) > 0

    @property
    def per_update(self) -> int:
        """Micro-batches of an update in each process."""
        return self.plan.num_micro_batches // self.num_ranks

    def of_updates(self, first: int) -> Iterator[Batch]:
        """This process's micro-batches in the order of the plan, from update `first` on."""
        share = self.plan.share(self.rank, self.num_ranks)
        loader = DataLoader(
            self.train,
            batch_sampler=islice(share, first * self.per_update, None),
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)

    def of_validation(self) -> Iterator[Batch]:
        """This process's part of a validation; where others have more, the last is empty."""
        batches = self.validation_rows()
        batches += [[]] * (-len(batches) % self.num_ranks)
        loader = DataLoader(
            self.validation,
            batch_sampler=batches[self.rank :: self.num_ranks],
            collate_fn=self.collate,
        )
        return iter(loader)

    def validation_rows(self) -> list[list[SlicedRow]]:
        """The rows of each batch of a validation, over all processes."""
        size, number = self.plan.micro_batch_size, len(self.validation)
        rows: list[SlicedRow] = [((index, 0),) for index in range(number)]
        return [rows[start : start + size] for start in range(0, number, size)]

    def largest_validation(self) -> Batch | None:
        """The batch with the most tokens, to try out what it costs; None if there is none."""
        if not self.validates:
            return None
        examples = [self.validation.__getitems__(rows) for rows in self.validation_rows()]

        def count_tokens(batch: Any) -> int:
            return sum(len(each.input_ids) for each in self.examples_of(batch))

        return self.collate(max(examples, key=count_tokens))

    def collate(self, examples: Sequence[Any]) -> Batch:
        """By the layout of this moment: under ZeRO-3 it is chosen when training has begun."""
        return collate(examples, self.pad_token_id, self.layout)

    def examples_of(self, examples: Sequence[Any]) -> list[TokenizedExample]:
        """The examples in what `train` and `validation` yield."""
        return list(examples)
