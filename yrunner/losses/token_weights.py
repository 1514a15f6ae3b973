"""Token weights other than NLIRG: DFT, EAFT, and NLIRG with entropy."""

# N = target tokens

import math

import torch
from torch import Tensor

EAFT_TOP = 20
"""EAFT uses the entropy over this many likeliest tokens."""


def dft_weight(loss_N: Tensor) -> Tensor:
    """The probability of each target, shape [N]: unlikely targets get small weights.

    A loss of NaN gets weight 0.

    Source: Dynamic Fine-Tuning, Wu et al., 2025 (arXiv 2508.05629).
    """
    return torch.exp(-loss_N).nan_to_num(0.0)


def eaft_weight(loss_N: Tensor, top_entropy_N: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Normalised entropy of the 20 likeliest tokens to the power `alpha`, shape [N].

    Where the model is sure, right or wrong, nothing is learned. `top_entropy_N`: in nats, of these
    tokens' probabilities rescaled to sum to 1. The loss matters only if it is not finite: then the
    weight is 0, as it is for an entropy of NaN.

    Source: Entropy-Adaptive Fine-Tuning, Diao et al., 2026 (arXiv 2601.02151).
    """
    weight_N = (top_entropy_N / math.log(EAFT_TOP)).clamp(0, 1) ** alpha
    is_usable_N = loss_N.isfinite() & ~top_entropy_N.isnan()
    return torch.where(is_usable_N, weight_N, torch.zeros_like(weight_N))


def nlirg_entropy_weight(
    loss_N: Tensor,
    entropy_N: Tensor,
    *,
    max_lr: float = 1.0,
    x0: float = 1.2,
    k: float = 1.7,
    sure_center: float = 4.0,
    sure_slope: float = 1.5,
    floor: float = 0.05,
    loss_deadline: float = 15.0,
) -> Tensor:
    """Weight of each token's gradient, shape [N], from loss and entropy in nats, shape [N].

        W(L, E) = max_lr * s(k (L - x0)) * (floor + (1 - floor) * trust)
        trust = s(sure_slope (sure_center - (L - E)))

    below `loss_deadline`, else 0; s is the logistic function. The first factor is the rising branch
    of NLIRG. The second falls with L - E, how many nats the loss exceeds what the model itself
    expected: it is 1 for a token that is only hard (high loss, high entropy) and `floor` for one
    that is sure and wrong (high loss, low entropy), probably a faulty label or knowledge about to
    be overwritten. What many rows say is learned all the same, since it recurs; what a single row
    says hardly is. A loss or entropy of NaN gets weight 0. Our extension of the published curve.
    """
    rising_N = torch.sigmoid(k * (loss_N - x0))
    trust_N = torch.sigmoid(sure_slope * (sure_center - loss_N + entropy_N))
    weight_N = max_lr * rising_N * (floor + (1 - floor) * trust_N)
    is_usable_N = (loss_N < loss_deadline) & ~entropy_N.isnan()
    return torch.where(is_usable_N, weight_N, torch.zeros_like(weight_N))
