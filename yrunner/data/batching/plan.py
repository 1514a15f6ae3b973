"""The plan of a run: what is learned from at which update, known before training.

One plan covers the whole run, all epochs in one sequence. So the number of updates is exact
beforehand, a resumed run finds its place by counting, and nothing depends on the data loader.
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
    """Iterating yields micro-batches: lists of rows, `micro_batch_size` at the most.

    Each update has exactly `num_micro_batches` of them; where examples run out at the end of an
    epoch, the last ones are shorter or empty.
    """

    num_groups: tuple[int, ...]
    """Groups of targets of each example, see token_batches.py."""
    token_batch: int
    """Targets of a group; 0: an example is one group."""
    micro_batch_size: int
    num_micro_batches: int
    epochs: int | None
    order: Literal["shuffle", "as_written"]
    seed: int
    max_updates: int | None = None
    """The run ends after this many updates or the epochs, whichever comes first."""
    lengths: Integers | None = None
    """Tokens of each example. Given, the rows of an update are dealt out to its micro-batches by
    length, which saves padding and cannot change the update."""
    packs: Packs | None = None
    """The examples that share a row; None: each has a row of its own."""
    kept: int = 0
    """Rows of each update that are left to others, its last ones; see keep_plan.py."""

    @property
    def lanes(self) -> int:
        """Rows of this plan that one update learns from."""
        return self.micro_batch_size * self.num_micro_batches - self.kept

    @cached_property
    def updates_per_epoch(self) -> int:
        """Updates of an epoch, the same for each: no order changes how long the examples are."""
        if self.packs is not None:
            return -(-len(self.packs) // self.lanes)
        if self.order == "as_written":
            return count_updates(self.num_groups, self.lanes)
        return count_updates(sorted(self.num_groups, reverse=True), self.lanes)

    @cached_property
    def epoch_ends(self) -> list[int]:
        """Updates that are done when each epoch is, as far as the run comes.

        The last may lie behind the end of the run, which `max_updates` can set inside an epoch.
        """
        size = self.updates_per_epoch
        begun = None if self.max_updates is None else -(-self.max_updates // size)
        num_epochs = min(number for number in (self.epochs, begun) if number is not None)
        return [size * (epoch + 1) for epoch in range(num_epochs)]

    @property
    def num_updates(self) -> int:
        """Updates of the run."""
        end = self.epoch_ends[-1]
        return end if self.max_updates is None else min(end, self.max_updates)

    def example_order(self, epoch: int) -> list[int]:
        """The examples in the order in which this epoch takes them up."""
        order = list(range(len(self.num_groups)))
        if self.order == "shuffle":
            random.Random(f"{self.seed} {epoch}").shuffle(order)
        return order

    def packs_of(self, epoch: int) -> Packs:
        """The packs in the order in which this epoch takes them up."""
        assert self.packs is not None and self.lengths is not None, "this plan does not pack"
        if self.order == "as_written":
            return self.packs
        return self.packs.shuffled(self.lengths, (self.seed, epoch))

    def updates(self) -> Iterator[list[SlicedRow]]:
        """What each update of the run learns from."""
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
        """The micro-batches of one of several processes; together they are all of them.

        Those that are computed at once are of like length.
        """
        assert self.num_micro_batches % num_ranks == 0, "every process does as many micro-steps"
        return islice(self, rank, None, num_ranks)

    def largest_micro_batch(self) -> list[SlicedRow]:
        """The micro-batch of the first epoch that has the most tokens."""
        first_epoch = islice(self, self.epoch_ends[0] * self.num_micro_batches)
        return max(first_epoch, key=lambda rows: sum(map(self._count_tokens, rows)))

    def rows_of(self, update: int) -> list[SlicedRow]:
        """What one update learns from, counted from 0."""
        return next(islice(self.updates(), update, None))

    def _updates_of(self, epoch: int) -> Iterator[list[SlicedRow]]:
        if self.packs is None:
            for slices in walk_lanes(self._queues(epoch), self.num_groups):
                yield [(place,) for place in slices]
            return
        rows = (tuple((example, 0) for example in pack) for pack in self.packs_of(epoch))
        while update := list(islice(rows, self.lanes)):
            yield update

    def _queues(self, epoch: int) -> list[Iterator[int]]:
        """What each lane takes its examples from: one queue for all keeps an order as it is."""
        order = self.example_order(epoch)
        if self.order == "as_written":
            return [iter(order)] * self.lanes
        return [iter(lane) for lane in balance_lanes(order, self.num_groups, self.lanes)]

    def _count_tokens(self, row: SlicedRow) -> int:
        """Tokens of a row, give or take a group: those behind its last target are cut off."""
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
    """Plan a run over examples with so many targets each, one at the least.

    `pack_to`: examples share rows of so many tokens, which needs `lengths`. The order of the files
    is kept where it is asked for, then only neighbours share a row. `kept_share`: such a share of
    the rows of each update are none of these examples.
    """
    targets = np.asarray(num_targets)
    assert len(targets) and targets.min() > 0, "an example without targets has no update"
    assert epochs is not None or max_updates is not None, "the run needs an end"
    lengths_E = None if lengths is None else np.asarray(lengths)
    packs = None
    if pack_to is not None:
        assert lengths_E is not None, "packing needs the lengths"
        assert token_batch == 0, "an example in a pack is learned all at once"
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
    """Epochs done after so many updates, as a fraction: 1.5 is half-way through the second."""
    epoch = bisect_left(epoch_ends, update)
    if epoch == len(epoch_ends):
        return float(len(epoch_ends))
    start = epoch_ends[epoch - 1] if epoch else 0
    return epoch + (update - start) / (epoch_ends[epoch] - start)
