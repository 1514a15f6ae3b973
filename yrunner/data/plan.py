"""The plan of a run: what is learned from at which update, known before training.

One plan covers the whole run, all epochs in one sequence. So the number of updates is exact
beforehand, a resumed run finds its place by counting, and nothing depends on the data loader.
"""

import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from typing import Literal

from yrunner.data.token_batches import Slice, count_groups, count_updates, walk_lanes


@dataclass(frozen=True)
class Plan:
    """Iterating yields micro-batches: lists of slices, `micro_batch_size` at the most.

    Each update has exactly `num_micro_batches` of them; where examples run out at the end of an
    epoch, the last ones are shorter or empty.
    """

    num_groups: tuple[int, ...]
    """Groups of targets of each example, see token_batches.py."""
    micro_batch_size: int
    num_micro_batches: int
    epochs: int | None
    order: Literal["shuffle", "as_written"]
    seed: int
    max_updates: int | None = None
    """The run ends after this many updates or the epochs, whichever comes first."""
    lengths: tuple[int, ...] = ()
    """Tokens of each example. Given, the examples of an update are dealt out to its micro-batches
    by length, which saves padding and cannot change the update."""

    @property
    def lanes(self) -> int:
        """Examples that one update learns from."""
        return self.micro_batch_size * self.num_micro_batches

    @cached_property
    def epoch_ends(self) -> list[int]:
        """Updates that are done when each epoch is, as far as the run comes.

        The last may lie behind the end of the run, which `max_updates` can set inside an epoch.
        """
        ends: list[int] = []
        for epoch in count() if self.epochs is None else range(self.epochs):
            updates = count_updates(self.example_order(epoch), self.num_groups, self.lanes)
            ends.append((ends[-1] if ends else 0) + updates)
            if self.max_updates is not None and ends[-1] >= self.max_updates:
                break
        return ends

    @property
    def num_updates(self) -> int:
        """Updates of the run."""
        end = self.epoch_ends[-1]
        return end if self.max_updates is None else min(end, self.max_updates)

    def __len__(self) -> int:
        return self.num_updates * self.num_micro_batches

    def example_order(self, epoch: int) -> list[int]:
        """The examples in the order in which this epoch takes them up."""
        order = list(range(len(self.num_groups)))
        if self.order == "shuffle":
            random.Random(f"{self.seed} {epoch}").shuffle(order)
        return order

    def updates(self) -> Iterator[list[Slice]]:
        """What each update of the run learns from."""
        every = (
            update
            for epoch in range(len(self.epoch_ends))
            for update in walk_lanes(self.example_order(epoch), self.num_groups, self.lanes)
        )
        return islice(every, self.num_updates)

    def __iter__(self) -> Iterator[list[Slice]]:
        size = self.micro_batch_size
        for update in self.updates():
            if self.lengths:
                update = sorted(update, key=lambda place: -self.lengths[place[0]])
            for number in range(self.num_micro_batches):
                yield update[number * size : (number + 1) * size]


def make_plan(
    num_targets: Sequence[int],
    *,
    token_batch: int,
    batch_size: int,
    accumulation: int,
    epochs: int | None,
    max_updates: int | None,
    order: Literal["shuffle", "as_written"],
    seed: int,
    lengths: Sequence[int] = (),
) -> Plan:
    """Plan a run over examples with so many targets each, one at the least."""
    assert num_targets and min(num_targets) > 0, "an example without targets has no update"
    assert epochs is not None or max_updates is not None, "the run needs an end"
    return Plan(
        num_groups=tuple(count_groups(number, token_batch) for number in num_targets),
        micro_batch_size=batch_size,
        num_micro_batches=accumulation,
        epochs=epochs,
        order=order,
        seed=seed,
        max_updates=max_updates,
        lengths=tuple(lengths),
    )


def epoch_after(update: int, epoch_ends: Sequence[int]) -> float:
    """Epochs done after so many updates, as a fraction: 1.5 is half-way through the second."""
    epoch = bisect_left(epoch_ends, update)
    if epoch == len(epoch_ends):
        return float(len(epoch_ends))
    start = epoch_ends[epoch - 1] if epoch else 0
    return epoch + (update - start) / (epoch_ends[epoch] - start)
