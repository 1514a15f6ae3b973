"""The plan of a run: the examples of every update, known before training.

One plan covers all epochs in one sequence. So the number of updates is exact beforehand, a resumed
run finds its position by counting, and nothing depends on the data loader.
"""

import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Literal

import numpy as np

from yrunner.data.batching.packing import Integers, Packs, pack, pack_in_order
from yrunner.data.batching.replay_rows import count_kept
from yrunner.data.batching.token_batches import (
    SlicedRow,
    balance_lanes,
    count_groups,
    count_updates,
    walk_lanes,
)


@dataclass(frozen=True, eq=False)
class Plan:
    """Iterating yields micro-batches: lists of at most `micro_batch_size` rows.

    Each update has exactly `num_micro_batches`; when examples run out at the end of an epoch, the
    last ones are shorter or empty.
    """

    num_groups: tuple[int, ...]
    """Number of groups of targets of each example, see token_batches.py."""
    token_batch: int
    """Targets per group; 0 for one group per example."""
    micro_batch_size: int
    num_micro_batches: int
    epochs: int | None
    order: Literal["shuffle", "as_written"]
    seed: int
    max_updates: int | None = None
    """The run ends after this many updates or after `epochs`, whichever comes first."""
    lengths: Integers | None = None
    """Tokens of each example. If given, the rows of an update are sorted into micro-batches by
    length, which saves padding and does not change the update."""
    packs: Packs | None = None
    """The examples that share a row; None for one example per row."""
    kept: int = 0
    """Rows at the end of each update that are left to replay rows, see replay_rows.py."""

    @property
    def lanes(self) -> int:
        """Rows per update, without replay rows."""
        return self.micro_batch_size * self.num_micro_batches - self.kept

    @property
    def rows_of_an_update(self) -> int:
        """Rows of a whole update, without replay rows: those of an epoch, if it has fewer."""
        return min(self.lanes, len(self.num_groups) if self.packs is None else len(self.packs))

    @cached_property
    def updates_per_epoch(self) -> int:
        """Updates per epoch, which no order of the examples changes."""
        if self.packs is not None:
            return -(-len(self.packs) // self.lanes)
        if self.order == "as_written":
            return count_updates(self.num_groups, self.lanes)
        return count_updates(sorted(self.num_groups, reverse=True), self.lanes)

    @cached_property
    def epoch_ends(self) -> list[int]:
        """The number of updates at the end of each epoch of the run.

        The last may exceed `num_updates`, because `max_updates` may end the run inside an epoch.
        """
        size = self.updates_per_epoch
        begun = None if self.max_updates is None else -(-self.max_updates // size)
        num_epochs = min(number for number in (self.epochs, begun) if number is not None)
        return [size * (epoch + 1) for epoch in range(num_epochs)]

    @property
    def num_updates(self) -> int:
        """Number of updates of the run."""
        end = self.epoch_ends[-1]
        return end if self.max_updates is None else min(end, self.max_updates)

    def data_row(self, example: int) -> int:
        """The row of the training data that an example of this plan belongs to."""
        return example

    def example_order(self, epoch: int) -> list[int]:
        """The examples in the order of this epoch."""
        order = list(range(len(self.num_groups)))
        if self.order == "shuffle":
            random.Random(f"{self.seed} {epoch}").shuffle(order)
        return order

    def packs_of(self, epoch: int) -> Packs:
        """The packs in the order of this epoch."""
        assert self.packs is not None and self.lengths is not None, "this plan does not pack"
        if self.order == "as_written":
            return self.packs
        return self.packs.shuffled(self.lengths, (self.seed, epoch))

    def updates(self) -> Iterator[list[SlicedRow]]:
        """The rows of each update of the run."""
        epochs = range(len(self.epoch_ends))
        every = (update for epoch in epochs for update in self._updates_of(epoch))
        return islice(every, self.num_updates)

    def __iter__(self) -> Iterator[list[SlicedRow]]:
        size = self.micro_batch_size
        for update in self.updates():
            if self.lengths is not None:
                update = sorted(update, key=self._count_tokens, reverse=True)
            for number in range(self.num_micro_batches):
                yield update[number * size : (number + 1) * size]

    def share(self, rank: int, num_ranks: int) -> Iterator[list[SlicedRow]]:
        """The micro-batches of one rank; those that ranks compute at once are of similar length."""
        assert self.num_micro_batches % num_ranks == 0, "every rank does as many micro-steps"
        return islice(self, rank, None, num_ranks)

    def largest_micro_batch(self) -> list[SlicedRow]:
        """The micro-batch with the most tokens in the first epoch."""
        first_epoch = islice(self, self.epoch_ends[0] * self.num_micro_batches)
        return max(first_epoch, key=lambda rows: sum(map(self._count_tokens, rows)))

    def rows_of(self, update: int) -> list[SlicedRow]:
        """The rows of an update, counted from 0."""
        return next(islice(self.updates(), update, None))

    def _updates_of(self, epoch: int) -> Iterator[list[SlicedRow]]:
        if self.packs is None:
            for slices in walk_lanes(self._queues(epoch), self.num_groups):
                yield [(one,) for one in slices]
            return
        rows = (tuple((example, 0) for example in pack) for pack in self.packs_of(epoch))
        while update := list(islice(rows, self.lanes)):
            yield update

    def _queues(self, epoch: int) -> list[Iterator[int]]:
        """The queue of examples of each lane: a common queue keeps their order."""
        order = self.example_order(epoch)
        if self.order == "as_written":
            return [iter(order)] * self.lanes
        return [iter(lane) for lane in balance_lanes(order, self.num_groups, self.lanes)]

    def _count_tokens(self, row: SlicedRow) -> int:
        """Approximate tokens of a row, without those after its last target."""
        assert self.lengths is not None
        return sum(
            int(self.lengths[example]) - self.token_batch * (self.num_groups[example] - 1 - group)
            for example, group in row
        )


def make_plan(
    num_targets: Sequence[int] | Integers,
    *,
    token_batch: int,
    batch_size: int,
    accumulation: int,
    epochs: int | None,
    max_updates: int | None,
    order: Literal["shuffle", "as_written"],
    seed: int,
    lengths: Sequence[int] | Integers | None = None,
    pack_to: int | None = None,
    kept_share: float = 0.0,
) -> Plan:
    """Plan a run over examples with at least one target each.

    `pack_to` packs examples into rows of that many tokens, and needs `lengths`; with order
    "as_written" only consecutive examples share a row. `kept_share` is the share of the rows of
    each update to leave to replay rows.
    """
    targets = np.asarray(num_targets)
    assert len(targets) and targets.min() > 0, "an example without targets has no update"
    assert epochs is not None or max_updates is not None, "the run needs an end"
    lengths_E = None if lengths is None else np.asarray(lengths)
    packs = None
    if pack_to is not None:
        assert lengths_E is not None, "packing needs the lengths"
        assert token_batch == 0, "packs are not cut into groups"
        packs = (pack if order == "shuffle" else pack_in_order)(lengths_E, pack_to)
    return Plan(
        num_groups=tuple(count_groups(number, token_batch) for number in targets.tolist()),
        token_batch=token_batch,
        micro_batch_size=batch_size,
        num_micro_batches=accumulation,
        epochs=epochs,
        order=order,
        seed=seed,
        max_updates=max_updates,
        lengths=lengths_E,
        packs=packs,
        kept=count_kept(kept_share, batch_size * accumulation) if kept_share else 0,
    )


def epoch_after(update: int, epoch_ends: Sequence[int]) -> float:
    """Epochs completed after an update, as a fraction: 1.5 is half-way through the second."""
    epoch = bisect_left(epoch_ends, update)
    if epoch == len(epoch_ends):
        return float(len(epoch_ends))
    start = epoch_ends[epoch - 1] if epoch else 0
    return epoch + (update - start) / (epoch_ends[epoch] - start)
