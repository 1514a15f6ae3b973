"""Order scored rows, and choose the ones to drop.

Knows a score by its name and its value alone, so it needs no torch: the board decides by it too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt, sqrt
from random import Random
from types import MappingProxyType
from typing import Literal, assert_never

MARGIN = "margin"
"""How much a model prefers the better answer of a pair to the worse one, in nats."""

SUSPICIOUS_WHEN_LOW = {"similarity", "correlation", MARGIN}
"""Scores of agreement; all others are suspicious when high."""


def is_suspicious_when_low(name: str) -> bool:
    """Whether low values of the score are suspicious; `cross-fit loss` counts as `loss`."""
    return name.rpartition(" ")[2] in SUSPICIOUS_WHEN_LOW


def suspicion(name: str, value: float) -> float:
    """The score with a sign that makes higher more suspicious."""
    return -value if is_suspicious_when_low(name) else value


GOLDEN_RATIO = (1 + sqrt(5)) / 2


def order_rows(
    scores: Sequence[float],
    order: Literal["ascending", "descending", "mixed", "blocks"],
    *,
    seed: int,
    blocks: int,
) -> list[int]:
    """The indices of the rows in their new order; equal scores keep the order of the file.

    `ascending` and `descending` go by the score itself. `mixed` interleaves low and high evenly:
    every stretch has the same mix of scores. `blocks` goes from low to high in `blocks` blocks of
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
    """Interleave rows of rising score: every stretch holds low, middle and high ones.

    The row of rank r goes to the fractional part of r times the golden ratio. The ranks in any
    interval are then spread evenly over all ranks, with at most three different gaps. To make seeds
    differ, neighbouring ranks are shuffled first, which hardly changes a mean.
    """
    size = isqrt(len(rising))
    near: list[int] = []
    for start in range(0, len(rising), size or 1):
        group = rising[start : start + size]
        near += random.sample(group, len(group))
    shift = random.random()
    places = [(shift + rank * GOLDEN_RATIO) % 1 for rank in range(len(near))]
    return [near[rank] for rank in sorted(range(len(near)), key=lambda rank: places[rank])]


NO_CLUSTER = 0
"""The number of the rows in no cluster, see clusters.py."""

Mark = Literal["keep", "drop"]
"""What a person decided about a row."""


@dataclass(frozen=True)
class Dropped:
    """A row left out of the sorted corpus."""

    index: int
    reason: str
    """With the score and the key of the recipe."""


def beyond_shares(
    suspicions: Sequence[float], clusters: Sequence[int], shares: Mapping[int, float]
) -> dict[int, str]:
    """The rows that are too many if only a share of each cluster is kept, and why.

    `clusters`: of each row; `shares`: by cluster, those without one keep all. The least suspicious
    rows stay, one at least unless the share is 0; of equal rows the later one.
    """
    members: dict[int, list[int]] = {}
    for index in sorted(range(len(suspicions)), key=lambda index: -suspicions[index]):
        members.setdefault(clusters[index], []).append(index)
    reasons: dict[int, str] = {}
    for number, share in shares.items():
        falling = members.get(number, [])
        kept = max(int(share > 0), round(share * len(falling)))
        where = f"of cluster {number}" if number != NO_CLUSTER else "in no cluster"
        reason = f"is not among the {100 * share:g} % least suspicious {where}"
        reasons |= dict.fromkeys(falling[: max(0, len(falling) - kept)], reason)
    return reasons


def choose_dropped(
    kind: str,
    scores: Sequence[float],
    *,
    drop_share: float,
    drop_above: float | None,
    drop_below: float | None,
    keep: int | None,
    marks: Mapping[int, Mark] = MappingProxyType({}),
    clusters: Sequence[int] = (),
    keep_of_each: float | None = None,
) -> list[Dropped]:
    """The rows to drop, the most suspicious first.

    The first rule that applies is a row's reason: its mark; a score above or below a bound; the
    most suspicious share of all rows, counting those beyond a bound; the most suspicious of each
    cluster, counting all before, until the share `keep_of_each` is left (`clusters`: of each row,
    0: none); the most suspicious of the rest, until `keep` rows remain. Of equal rows the earlier
    one is dropped first. A row that is marked keep stays, and no other is dropped in its place.
    """
    falling = sorted(range(len(scores)), key=lambda index: -suspicion(kind, scores[index]))
    reasons: dict[int, str] = {}
    for index in falling:
        if marks.get(index) == "drop":
            reasons[index] = "is marked drop (sort.marks)"
        elif drop_above is not None and scores[index] > drop_above:
            reasons[index] = f"is above {drop_above:g} (sort.drop_above)"
        elif drop_below is not None and scores[index] < drop_below:
            reasons[index] = f"is below {drop_below:g} (sort.drop_below)"
    for index in falling[: round(drop_share * len(falling))]:
        share = f"{100 * drop_share:g} %"
        reasons.setdefault(index, f"is among the {share} most suspicious (sort.drop_share)")
    if keep_of_each is not None:
        suspicions = [suspicion(kind, score) for score in scores]
        shares = dict.fromkeys({*clusters} - {NO_CLUSTER}, keep_of_each)
        for index, reason in beyond_shares(suspicions, clusters, shares).items():
            reasons.setdefault(index, f"{reason} (sort.clusters.keep)")
    remaining = [index for index in falling if index not in reasons]
    if keep is not None:
        for index in remaining[: max(0, len(remaining) - keep)]:
            reasons[index] = f"is not among the {keep:,} least suspicious (sort.keep)"
    return [
        Dropped(index, f"{kind} {scores[index]:.6g} {reasons[index]}")
        for index in falling
        if index in reasons and marks.get(index) != "keep"
    ]
