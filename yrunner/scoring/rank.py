"""From a score per row to the order in which the rows are written, and the rows left out.

One number for a row: what its losses and entropies say about how suspicious it is.

Each score is defined for every row: what says nothing about a row is not held against it.
"""

# N = target tokens

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, isqrt, sqrt
from random import Random
from typing import Literal, assert_never

import torch
from torch import Tensor

from yrunner.scoring.suspicious_spans import SURPRISING_LOSS, bounded, bounded_loss, worst_span

SURE_ENTROPY = 1.0
"""Entropy in nats below which the model was sure of something else."""
ROUNDING = 1e-6
"""Deviations of a smaller share of the values themselves are rounding of float32."""


def similarity(loss_N: Tensor, entropy_N: Tensor) -> float:
    """Cosine of losses and entropies, as published: 1 where the model errs only where it doubts.

    Without any loss 1, with losses and no doubt at all 0.
    """
    loss_N, entropy_N = bounded(loss_N, entropy_N)
    return 1.0 if not loss_N.any() else _cosine(loss_N, entropy_N)


def correlation(loss_N: Tensor, entropy_N: Tensor) -> float:
    """Pearson's correlation of losses and entropies: what the published code computes.

    1 where one of the two is constant, as in an answer of one token: there is no shape to differ.
    """
    centred_2N = []
    for figure_N in bounded(loss_N, entropy_N):
        centred_N = figure_N - _mean(figure_N)
        if centred_N.norm() <= ROUNDING * figure_N.norm():
            return 1.0
        centred_2N.append(centred_N)
    return _cosine(*centred_2N)


def surprise(loss_N: Tensor, entropy_N: Tensor) -> float:
    """How many targets have a loss above 3: a sure one counts 1, a doubtful one a half.

    As published it is a count, not a share: one wrong number weighs as much in a long answer as in
    a short one, but of sound answers the long ones have more of it.
    """
    loss_N, entropy_N = bounded(loss_N, entropy_N)
    is_surprise_N = loss_N > SURPRISING_LOSS
    is_sure_N = is_surprise_N & (entropy_N < SURE_ENTROPY)
    return (int(is_surprise_N.sum()) + int(is_sure_N.sum())) / 2


def loss(loss_N: Tensor, entropy_N: Tensor) -> float:
    """Mean loss in nats per target."""
    return _mean(bounded(loss_N, entropy_N)[0])


def perplexity(loss_N: Tensor, entropy_N: Tensor) -> float:
    """Exponential of the mean loss: among so many equally likely tokens the model chose."""
    return exp(loss(loss_N, entropy_N))


def entropy(loss_N: Tensor, entropy_N: Tensor) -> float:
    """Mean entropy in nats per target."""
    return _mean(bounded(loss_N, entropy_N)[1])


def excess(loss_N: Tensor, entropy_N: Tensor) -> float:
    """Mean of loss less entropy in nats: how much worse than the model itself expected.

    The entropy is the loss that the model expects of a token drawn from its own prediction.
    """
    loss_N, entropy_N = bounded(loss_N, entropy_N)
    return _mean(loss_N - entropy_N)


def knn_loss(loss_N: Tensor, knn_loss_N: Tensor) -> float:
    """Mean loss in nats by the model and the neighbours of each target, see neighbours.py."""
    return _mean(bounded_loss(knn_loss_N))


def unexplained(loss_N: Tensor, knn_loss_N: Tensor) -> float:
    """The highest of `unexplained_losses` in nats: one wrong number is a fault in any row."""
    return max(unexplained_losses(loss_N, knn_loss_N).tolist(), default=0.0)


def unexplained_losses(loss_N: Tensor, knn_loss_N: Tensor) -> Tensor:
    """The lower of two losses of each target, in nats and float64: what neither expected.

    `loss_N` is by a model that has learned from other rows, `knn_loss_N` by the places of other
    rows that begin alike. Of sound targets each misses some, but seldom the same.
    """
    return torch.minimum(bounded_loss(loss_N), bounded_loss(knn_loss_N))


def divergence(loss_N: Tensor, entropy_N: Tensor) -> float:
    """Strength of the worst span that is sure and wrong, in standard deviations; 0 without one."""
    span = worst_span(loss_N, entropy_N)
    return 0.0 if span is None else span.strength


SCORES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "similarity": similarity,
    "correlation": correlation,
    "surprise": surprise,
    "loss": loss,
    "perplexity": perplexity,
    "entropy": entropy,
    "excess": excess,
    "divergence": divergence,
}
"""From the losses and entropies of one row in nats, both of shape [N], to its score."""

KNN_LOSS, UNEXPLAINED = "knn_loss", "unexplained"
ASKING_OTHERS: dict[str, Callable[[Tensor, Tensor], float]] = {
    KNN_LOSS: knn_loss,
    UNEXPLAINED: unexplained,
}
"""From the losses of one row in nats, by a model and by other rows as well, to its score."""

CROSS_FIT = "cross-fit "
"""Before the name of a score: by a model that has learned from other rows."""

SUSPICIOUS_WHEN_LOW = {"similarity", "correlation"}
"""Scores that fall where loss and entropy part; all others rise."""


def score_row(
    loss_N: Tensor, entropy_N: Tensor, kinds: Iterable[str], knn_loss_N: Tensor | None = None
) -> dict[str, float]:
    """The scores of one row by kind, in the order of `kinds`.

    Those that ask other rows are left out where `knn_loss_N` is not given.
    """
    scores = {}
    for kind in kinds:
        if kind in SCORES:
            scores[kind] = SCORES[kind](loss_N, entropy_N)
        elif knn_loss_N is not None:
            scores[kind] = ASKING_OTHERS[kind](loss_N, knn_loss_N)
    return scores


def is_suspicious_when_low(name: str) -> bool:
    """Whether a score of this name points at a row by being low; `cross-fit loss` is a loss."""
    return name.split()[-1] in SUSPICIOUS_WHEN_LOW


def suspicion(name: str, value: float) -> float:
    """The score with the sign that makes higher more suspicious."""
    return -value if is_suspicious_when_low(name) else value


def _mean(figure_N: Tensor) -> float:
    """The mean; 0 of nothing."""
    return figure_N.mean().item() if len(figure_N) else 0.0


def _cosine(left_N: Tensor, right_N: Tensor) -> float:
    """Cosine of two vectors, 0 where one has no length."""
    # Each is scaled first: a product of lengths could be too small for a number.
    lengths = [vector_N.norm() for vector_N in (left_N, right_N)]
    if not all(lengths):
        return 0.0
    cosine = (left_N / lengths[0]) @ (right_N / lengths[1])
    return cosine.clamp(-1, 1).item()


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
