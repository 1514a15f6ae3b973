"""Which kept rows an update learns from, beside the rows of the plan: found by counting.

The rows come round and round, in a new order each time. Nothing is remembered between updates, so
a resumed run finds its place, and every process knows the rows of all.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from yrunner.data.batching.packing import Integers, Packs, pack


def count_kept(share: float, lanes: int) -> int:
    """Rows of an update with so many in all that are kept ones: one at the least, and never all."""
    return min(max(1, round(share * lanes)), lanes - 1)


@dataclass(frozen=True, eq=False)
class KeepPlan:
    """The kept rows of each update, each row with the examples that lie in it."""

    num_targets_E: Integers
    """Targets of each kept example."""
    lengths_E: Integers
    packs: Packs | None
    """The examples that share a row; None: each has a row of its own."""
    per_update: int
    """Kept rows of an update."""
    seed: int

    def rows(self, update: int) -> list[list[int]]:
        """The rows of an update, counted from 0."""
        size = len(self.num_targets_E) if self.packs is None else len(self.packs)
        first = update * self.per_update
        return [
            self._round(place // size)[place % size]
            for place in range(first, first + self.per_update)
        ]

    def count_targets(self, update: int) -> int:
        """Targets of all kept rows of an update."""
        return sum(int(self.num_targets_E[row].sum()) for row in self.rows(update))

    def _round(self, number: int) -> list[list[int]]:
        return _rows_of_round(self, number)


@lru_cache(maxsize=2)
def _rows_of_round(plan: KeepPlan, number: int) -> list[list[int]]:
    """All rows in the order of one time round. An update can lie across two."""
    if plan.packs is not None:
        return list(plan.packs.shuffled(plan.lengths_E, (plan.seed, number)))
    order = list(range(len(plan.num_targets_E)))
    random.Random(f"kept {plan.seed} {number}").shuffle(order)
    return [[example] for example in order]


def make_keep_plan(
    num_targets: Sequence[int] | Integers,
    lengths: Sequence[int] | Integers,
    *,
    per_update: int,
    seed: int,
    pack_to: int | None = None,
) -> KeepPlan:
    """Plan the kept rows. `pack_to`: examples share rows of so many tokens, as the field's do."""
    lengths_E = np.asarray(lengths)
    packs = None if pack_to is None else pack(lengths_E, pack_to)
    return KeepPlan(np.asarray(num_targets), lengths_E, packs, per_update, seed)
