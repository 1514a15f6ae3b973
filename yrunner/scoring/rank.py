"""Score rows by how suspicious they are.

Every score is defined for every row: without evidence a row is not suspicious.
"""

# N = target tokens

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor

from yrunner.scoring.suspicious_spans import SURPRISING_LOSS, bounded, bounded_loss, worst_span

SURE_ENTROPY = 1.0
"""Entropy in nats below which the model was sure."""
ROUNDING = 1e-6
"""Relative deviations below this are rounding of float32."""


def similarity(loss_N: Tensor, entropy_N: Tensor) -> float:
    """Cosine of losses and entropies, as published: 1 if the model errs only where it doubts.

    1 without any loss, 0 with losses and no entropy at all.
    """
    loss_N, entropy_N = bounded(loss_N, entropy_N)
    return 1.0 if not loss_N.any() else _cosine(loss_N, entropy_N)


def correlation(loss_N: Tensor, entropy_N: Tensor) -> float:
    """Pearson's correlation of losses and entropies, which the published code computes.

    1 if one of them is constant, as in an answer of one token.
    """
    centred_2N = []
    for figure_N in bounded(loss_N, entropy_N):
        centred_N = figure_N - _mean(figure_N)
        if centred_N.norm() <= ROUNDING * figure_N.norm():
            return 1.0
        centred_2N.append(centred_N)
    return _cosine(*centred_2N)


def surprise(loss_N: Tensor, entropy_N: Tensor) -> float:
    """Number of targets with a loss above 3: 1 for a sure one, 1/2 for a doubtful one.

    As published a count, not a share: one wrong number weighs as much in a long answer as in a
    short one, but long sound answers have more surprises.
    """
    loss_N, entropy_N = bounded(loss_N, entropy_N)
    is_surprise_N = loss_N > SURPRISING_LOSS
    is_sure_N = is_surprise_N & (entropy_N < SURE_ENTROPY)
    return (int(is_surprise_N.sum()) + int(is_sure_N.sum())) / 2


def loss(loss_N: Tensor, entropy_N: Tensor) -> float:
    """Mean loss in nats per target."""
    return _mean(bounded(loss_N, entropy_N)[0])


def perplexity(loss_N: Tensor, entropy_N: Tensor) -> float:
    """Exponential of the mean loss: the number of equally likely tokens with the same loss."""
    return exp(loss(loss_N, entropy_N))


def entropy(loss_N: Tensor, entropy_N: Tensor) -> float:
    """Mean entropy in nats per target."""
    return _mean(bounded(loss_N, entropy_N)[1])


def excess(loss_N: Tensor, entropy_N: Tensor) -> float:
    """Mean of loss minus entropy in nats: how much worse than the model itself expected.

    The entropy is the expected loss of a token drawn from the model's prediction.
    """
    loss_N, entropy_N = bounded(loss_N, entropy_N)
    return _mean(loss_N - entropy_N)


@dataclass(frozen=True)
class Neighbourhood:
    """What similar places in other rows say about the targets of a row, see knn.py."""

    knn_loss_N: Tensor
    """Loss in nats of model and nearest neighbours together."""
    deviation_N: Tensor
    """`outlier_targets`."""


def outlier_targets(
    deviations: Sequence[Tensor],
    knn_deviations: Sequence[Tensor],
    losses: Sequence[Tensor],
    knn_losses: Sequence[Tensor],
) -> list[Tensor]:
    """How far each target of each row is above similar places, in standard deviations.

    The mean of two: of the loss with neighbours, which contradicts other rows, and of the model's,
    which sees what does not belong to its question. The model counts as much as the part of its
    loss that neighbours leave: where they explain nearly all, it knows less than they do.
    """
    total, left = (
        float(sum(bounded_loss(loss_N).sum() for loss_N in of_rows))
        for of_rows in (losses, knn_losses)
    )
    weight = min(1.0, left / total) if total else 1.0
    return [
        (knn_deviation_N + weight * deviation_N) / (1 + weight)
        for deviation_N, knn_deviation_N in zip(deviations, knn_deviations, strict=True)
    ]


def outlier(loss_N: Tensor, near: Neighbourhood) -> float:
    """Mean of `outlier_targets`."""
    return _mean(near.deviation_N)


def knn_loss(loss_N: Tensor, near: Neighbourhood) -> float:
    """Mean loss in nats of model and nearest neighbours together, see knn.py."""
    return _mean(bounded_loss(near.knn_loss_N))


def unexplained(loss_N: Tensor, near: Neighbourhood) -> float:
    """The largest of `unexplained_losses` in nats: one wrong number is a fault in any row."""
    return max(unexplained_losses(loss_N, near.knn_loss_N).tolist(), default=0.0)


def unexplained_losses(loss_N: Tensor, knn_loss_N: Tensor) -> Tensor:
    """The smaller of two losses of each target, in nats and float64: high if neither explains it.

    `loss_N` is from a model trained on other rows, `knn_loss_N` from similar contexts in other
    rows. Each misses some sound targets, but seldom the same ones.
    """
    return torch.minimum(bounded_loss(loss_N), bounded_loss(knn_loss_N))


def divergence(loss_N: Tensor, entropy_N: Tensor) -> float:
    """Strength of the worst confident error, in standard deviations; 0 without one."""
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

OUTLIER, KNN_LOSS, UNEXPLAINED = "outlier", "knn_loss", "unexplained"
KNN_SCORES: dict[str, Callable[[Tensor, Neighbourhood], float]] = {
    OUTLIER: outlier,
    KNN_LOSS: knn_loss,
    UNEXPLAINED: unexplained,
}
"""From the losses of one row in nats and its neighbourhood to its score."""

CROSS_FIT = "cross-fit "
"""Prefix of a score by a model trained on other rows."""


def score_row(
    loss_N: Tensor, entropy_N: Tensor, kinds: Iterable[str], near: Neighbourhood | None = None
) -> dict[str, float]:
    """The scores of one row by kind, in the order of `kinds`.

    Without `near` the scores that need it are left out.
    """
    scores = {}
    for kind in kinds:
        if kind in SCORES:
            scores[kind] = SCORES[kind](loss_N, entropy_N)
        elif near is not None:
            scores[kind] = KNN_SCORES[kind](loss_N, near)
    return scores


def _mean(figure_N: Tensor) -> float:
    """The mean; 0 if empty."""
    return figure_N.mean().item() if len(figure_N) else 0.0


def _cosine(left_N: Tensor, right_N: Tensor) -> float:
    """Cosine of two vectors, 0 if one is zero."""
    # Each is scaled first: the product of lengths could underflow.
    lengths = [vector_N.norm() for vector_N in (left_N, right_N)]
    if not all(lengths):
        return 0.0
    cosine = (left_N / lengths[0]) @ (right_N / lengths[1])
    return cosine.clamp(-1, 1).item()
