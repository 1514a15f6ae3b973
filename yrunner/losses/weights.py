"""Weights of the form of NLIRG that others have published, to be compared with it."""

# N = target tokens

import math

import torch
from torch import Tensor

EAFT_TOP = 20
"""Likeliest tokens whose entropy EAFT looks at."""


def dft_weight(loss_N: Tensor) -> Tensor:
    """The probability of each target, shape [N]: what the model doubts is learned little.

    Source: Dynamic Fine-Tuning, Wu et al., 2025 (arXiv 2508.05629).
    """
    return torch.exp(-loss_N)


def eaft_weight(top_entropy_N: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Normalised entropy of the 20 likeliest tokens to the power `alpha`, shape [N].

    Where the model is sure, right or wrong, nothing is learned. `top_entropy_N`: in nats, of the
    probabilities of these tokens scaled to a sum of 1.

    Source: Entropy-Adaptive Fine-Tuning, Diao et al., 2026 (arXiv 2601.02151).
    """
    return (top_entropy_N / math.log(EAFT_TOP)).clamp(0, 1) ** alpha
