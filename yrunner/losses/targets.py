"""Statistics of each target token, and the sums that one update divides.

The only place where labels are shifted against logits.
"""

# B = examples, T = tokens, K = predicting columns, N = targets, Z = zones

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from yrunner.losses.nlirg import HARD_UP_TO, ZONES, zone_of
from yrunner.tokens import IGNORE_INDEX


@dataclass(frozen=True)
class TokenWeight:
    """The weight of each target: a pure function of its loss and its entropy."""

    of: Callable[[Tensor, Tensor], Tensor]
    """From loss and entropy in nats, both detached, shape [N], to weights, shape [N]."""
    top: int | None = None
    """`of` gets the entropy over the `top` likeliest tokens; None: over the whole vocabulary."""


PLAIN = TokenWeight(lambda loss_N, _: torch.ones_like(loss_N))
"""Every target counts alike."""


@dataclass(frozen=True)
class Targets:
    """Statistics of the targets of a micro-batch, row by row."""

    weighted: Tensor
    """Sum of weight times loss, the only tensor with a gradient. Divided once, for the update."""
    loss_N: Tensor
    """Cross-entropy in nats."""
    entropy_N: Tensor
    """Entropy of the prediction in nats."""
    weight_N: Tensor
    is_top_N: Tensor
    """1 where no token is likelier than the target, else 0."""
    gradient_N: Tensor
    """Norm of the gradient at the logits, weight times (softmax - one-hot)."""
    top_N: Tensor | None = None
    """The likeliest token, if requested."""
    divergence_N: Tensor | None = None
    """Distance to the teacher in nats, if there is one; then `weighted` is the loss of both."""


def predicting_columns(labels_BT: Tensor) -> Tensor:
    """Columns whose logits predict a target in any row, shape [K]: one before each target's own.

    Pass them to a model as `logits_to_keep`, and it computes no other logits.
    """
    return (labels_BT[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)


def target_places(labels_BT: Tensor, columns_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mask of the positions that predict a target, shape [B, K], and the labels, shape [N].

    Without `columns_K` the mask covers all columns but the last, shape [B, T - 1].
    """
    labels_BK = labels_BT[:, 1:] if columns_K is None else labels_BT[:, columns_K + 1]
    is_target_BK = labels_BK != IGNORE_INDEX
    return is_target_BK, labels_BK[is_target_BK]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision to float32; wider tensors unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def weigh(weight_N: Tensor, value_N: Tensor) -> Tensor:
    """Weight times value; 0 where the weight is 0 or NaN, even if the value is NaN."""
    return torch.where(weight_N.abs() > 0, weight_N * value_N, torch.zeros_like(value_N))


def sum_targets(targets: Targets, loss_deadline: float = HARD_UP_TO) -> Tensor:
    """The logged sums over a micro-batch: added up over micro-steps, divided once.

    Detached, float64, shape [15]: the sums of loss, of weight times loss, of weights, of entropies,
    of top-1 hits and of refused targets, the targets of each zone, the gradient of each zone, all
    targets. Losses from `loss_deadline` on count as refused.
    """
    loss_N, weight_N = targets.loss_N, targets.weight_N
    figures = [loss_N, weigh(weight_N, loss_N), weight_N, targets.entropy_N, targets.is_top_N]
    figures.append(~(weight_N > 0))
    sums = torch.stack([figure_N.double().sum() for figure_N in figures])
    every_Z = torch.arange(len(ZONES), device=loss_N.device)
    is_zone_ZN = zone_of(loss_N, loss_deadline) == every_Z[:, None]
    gradient_N = targets.gradient_N.double()
    # Not a product: a refused target whose gradient is NaN must not spoil other zones.
    gradient_Z = torch.where(is_zone_ZN, gradient_N, torch.zeros_like(gradient_N)).sum(dim=1)
    count = torch.full((1,), float(len(loss_N)), dtype=torch.float64, device=loss_N.device)
    return torch.cat([sums, is_zone_ZN.sum(dim=1).double(), gradient_Z, count])
