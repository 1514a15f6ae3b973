"""The replay rows of each update, beside the rows of the plan.

They are repeated in rounds, each in a new order. The rows of an update follow from its number, so a
resumed run continues with the right ones, and every rank knows the rows of all ranks.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from yrunner.data.batching.packing import Integers, Packs, pack


def count_kept(share: float, lanes: int) -> int:
    """Replay rows among the `lanes` rows of an update: at least one, never all."""
    return min(max(1, round(share * lanes)), lanes - 1)


def count_kept_beside_groups(share: float, lanes: int, generations: int) -> int:
    """The same where the other rows of an update are whole groups of answers: at least one."""
    groups = round((1 - share) * lanes / generations)
    return lanes - generations * min(max(1, groups), (lanes - 1) // generations)


@dataclass(frozen=True, eq=False)
class KeepPlan:
    """The replay rows of each update, each row as a list of examples."""

    num_targets_E: Integers
    """Targets of each replay example."""
    lengths_E: Integers
    packs: Packs | None
    """The examples that share a row; None for one example per row."""
    per_update: int
    """Replay rows per update."""
    seed: int

    def rows(self, update: int) -> list[list[int]]:
        """The rows of an update, counted from 0."""
        size = len(self.num_targets_E) if self.packs is None else len(self.packs)
        first = update * self.per_update
        return [
            _rows_of_round(self, number // size)[number % size]
            for number in range(first, first + self.per_update)
        ]

    def count_targets(self, update: int) -> int:
        """Number of targets in the replay rows of an update."""
        return sum(int(self.num_targets_E[row].sum()) for row in self.rows(update))


@lru_cache(maxsize=2)
def _rows_of_round(plan: KeepPlan, number: int) -> list[list[int]]:
    """All rows in the order of one round; an update may need rows of two rounds."""
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
    """Plan the replay rows; `pack_to` packs them into rows of that many tokens."""
    lengths_E = np.asarray(lengths)
    packs = None if pack_to is None else pack(lengths_E, pack_to)
    return KeepPlan(np.asarray(num_targets), lengths_E, packs, per_update, seed)
