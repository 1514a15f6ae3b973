"""NLIRG: weight each token by how hard it is right now.

Gradient-driven Nonlinear Learning Intensity Regulation, published by YAFO (Y-Trainer, 2025): small
weights for tokens that are mastered, full ones for tokens to learn, none for hopeless ones.
"""

# N = target tokens

import torch
from torch import Tensor

ZONES = ("easy", "learning", "hard", "refused")
"""Names of the four zones, from the lowest losses to the highest."""

EASY_UP_TO, LEARNING_UP_TO, HARD_UP_TO = 1.45, 6.6, 15.0
"""The published borders of the zones, in nats."""


def nlirg_weight(
    loss_N: Tensor,
    *,
    max_lr: float = 1.0,
    x0: float = 1.2,
    k: float = 1.7,
    min_lr: float = 5e-8,
    loss_threshold: float = 3.0,
    loss_deadline: float = 15.0,
    hard_center: float = 6.2,
    hard_slope: float = 1.0,
) -> Tensor:
    """Weight of each token's gradient, shape [N], from its loss in nats, shape [N].

    Up to `loss_threshold` the weight rises with the loss along a sigmoid around `x0`; above it
    falls along a second one around `hard_center`; from `loss_deadline` on it is 0. With the
    published values the two branches meet at 3.0 with a step of 0.006: 0.9552 and 0.9608.

    Source: the published function `dynamic_sigmoid_batch`, whose names and defaults these are
    (`hard_center` and `hard_slope` are constants there).
    """
    epsilon = torch.finfo(torch.float32).eps
    rising_N = max_lr * torch.sigmoid(k * (loss_N - x0)) + epsilon
    falling_N = max_lr * torch.sigmoid(hard_slope * (hard_center - loss_N)) + epsilon + min_lr
    weight_N = torch.where(loss_N <= loss_threshold, rising_N, falling_N)
    return torch.where(loss_N < loss_deadline, weight_N, torch.zeros_like(weight_N))


def zone_edges(loss_deadline: float = HARD_UP_TO) -> tuple[float, float, float]:
    """Losses between the four zones; a low `loss_deadline` leaves zones below it empty."""
    return min(EASY_UP_TO, loss_deadline), min(LEARNING_UP_TO, loss_deadline), loss_deadline


def zone_of(loss_N: Tensor, loss_deadline: float = HARD_UP_TO) -> Tensor:
    """Index in `ZONES` of each loss, shape [N]; losses from `loss_deadline` on are refused.

    A loss of NaN counts as refused.
    """
    zone_N = (loss_N > EASY_UP_TO).long() + (loss_N >= LEARNING_UP_TO).long()
    return torch.where(loss_N < loss_deadline, zone_N, torch.full_like(zone_N, 3))
