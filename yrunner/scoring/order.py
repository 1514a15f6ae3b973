"""From a score per row to the order in which the rows are written, and the rows left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt, sqrt
from random import Random
from typing import Literal, assert_never

from yrunner.scoring.rank import suspicion

GOLDEN_RATIO = (1 + sqrt(5)) / 2


def order_rows(
    scores: Sequence[float],
    order: Literal["ascending", "descending", "mixed", "blocks"],
    *,
    seed: int,
    blocks: int,
) -> list[int]:
    """The indices of the rows in their new order; of equal scores the earlier row is first.

    `ascending` and `descending` go by the score itself. `mixed` interleaves low and high evenly:
    every stretch has the same mix of scores. `blocks` goes from low to high in so many blocks of
    equal size, mixed within. `seed` chooses among the mixed orders.
    """
    rising = sorted(range(len(scores)), key=lambda index: scores[index])
    match order:
        case "ascending":
            return rising
        case "descending":
            return sorted(range(len(scores)), key=lambda index: -scores[index])
        case "mixed":
            return _mix(rising, Random(seed))
        case "blocks":
            random = Random(seed)
            borders = [len(rising) * block // blocks for block in range(blocks + 1)]
            parts = [_mix(rising[start:end], random) for start, end in pairwise(borders)]
            return [index for part in parts for index in part]
        case _:
            assert_never(order)


def _mix(rising: list[int], random: Random) -> list[int]:
    """Rows of rising score, interleaved so that every stretch holds low, middle and high ones.

    The row of rank r is put at the fractional part of r times the golden ratio. The ranks that fall
    into any interval are then spread evenly over all ranks: they stand at most three distances
    apart. To make seeds differ, neighbours in rank change places first, which hardly moves a mean.
    """
    size = isqrt(len(rising))
    near: list[int] = []
    for start in range(0, len(rising), size or 1):
        group = rising[start : start + size]
        near += random.sample(group, len(group))
    shift = random.random()
    places = [(shift + rank * GOLDEN_RATIO) % 1 for rank in range(len(near))]
    return [near[rank] for rank in sorted(range(len(near)), key=lambda rank: places[rank])]


@dataclass(frozen=True)
class Dropped:
    """A row that is left out of the sorted corpus."""

    index: int
    reason: str
    """In words, with the score and the key of the recipe."""


def choose_dropped(
    kind: str,
    scores: Sequence[float],
    *,
    drop_share: float,
    drop_above: float | None,
    drop_below: float | None,
    keep: int | None,
) -> list[Dropped]:
    """The rows that one of the rules leaves out, the most suspicious first.

    A row goes when any rule says so, and the first that does is its reason: a score above or below
    a bound; then the most suspicious share of all rows, those beyond a bound counted in; then the
    most suspicious of what is left, until `keep` rows remain. Of equals the earlier row goes first.
    """
    falling = sorted(range(len(scores)), key=lambda index: -suspicion(kind, scores[index]))
    reasons: dict[int, str] = {}
    for index in falling:
        if drop_above is not None and scores[index] > drop_above:
            reasons[index] = f"is above {drop_above:g} (sort.drop_above)"
        elif drop_below is not None and scores[index] < drop_below:
            reasons[index] = f"is below {drop_below:g} (sort.drop_below)"
    for index in falling[: round(drop_share * len(falling))]:
        share = f"{100 * drop_share:g} %"
        reasons.setdefault(index, f"is among the {share} most suspicious (sort.drop_share)")
    remaining = [index for index in falling if index not in reasons]
    if keep is not None:
        for index in remaining[: max(0, len(remaining) - keep)]:
            reasons[index] = f"is not among the {keep:,} least suspicious (sort.keep)"
    return [
        Dropped(index, f"{kind} {scores[index]:.6g} {reasons[index]}")
        for index in falling
        if index in reasons
    ]
