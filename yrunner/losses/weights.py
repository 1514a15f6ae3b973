"""Weights of the form of NLIRG that others have published, to be compared with it."""

# N = target tokens

import math

import torch
from torch import Tensor

EAFT_TOP = 20
"""Likeliest tokens whose entropy EAFT looks at."""


def dft_weight(loss_N: Tensor) -> Tensor:
    """The probability of each target, shape [N]: what the model doubts is learned little.

    A loss that is not a number is refused: weight 0.

    Source: Dynamic Fine-Tuning, Wu et al., 2025 (arXiv 2508.05629).
    """
    return torch.exp(-loss_N).nan_to_num(0.0)


def eaft_weight(loss_N: Tensor, top_entropy_N: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Normalised entropy of the 20 likeliest tokens to the power `alpha`, shape [N].

    Where the model is sure, right or wrong, nothing is learned. `top_entropy_N`: in nats, of the
    probabilities of these tokens scaled to a sum of 1. The loss does not matter, but for one that
    is infinite or not a number, which is refused: weight 0. So is an entropy that is not a number.

    Source: Entropy-Adaptive Fine-Tuning, Diao et al., 2026 (arXiv 2601.02151).
    """
    weight_N = (top_entropy_N / math.log(EAFT_TOP)).clamp(0, 1) ** alpha
    is_usable_N = loss_N.isfinite() & ~top_entropy_N.isnan()
    return torch.where(is_usable_N, weight_N, torch.zeros_like(weight_N))
