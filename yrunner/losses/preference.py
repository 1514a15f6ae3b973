"""Losses over pairs of answers and over rated answers; each returns one value per pair or answer.

`D` is the margin of a pair, (chosen - chosen of the reference) - (rejected - rejected of the
reference), of log-probabilities in nats: sums over the targets of an answer, or means.
"""

# Shapes: P = pairs, S = answers

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

DpoForm = Literal["sigmoid", "ipo", "hinge", "robust", "conservative"]

SURE = -1.2e-7
"""A mean log-probability above this counts as this: float32 resolves no smaller loss, and the odds
of a certain answer are infinite."""


def dpo_loss(
    margin_P: Tensor, *, form: DpoForm, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """DPO of each pair by its margin D, with s the logistic function and e the label smoothing.

    sigmoid       -log s(beta D)                                     arXiv:2305.18290
    conservative  -(1 - e) log s(beta D) - e log s(-beta D)          expected loss of noisy pairs
    robust        [-(1 - e) log s(beta D) + e log s(-beta D)] / (1 - 2e)      arXiv:2403.00409
    hinge         max(0, 1 - beta D)                                 arXiv:2305.10425
    ipo           (D - 1 / (2 beta))^2                               arXiv:2310.12036
    """
    scaled_P, swapped = beta * margin_P, label_smoothing
    match form:
        case "sigmoid":
            return -logsigmoid(scaled_P)
        case "conservative":
            return -(1 - swapped) * logsigmoid(scaled_P) - swapped * logsigmoid(-scaled_P)
        case "robust":
            unbiased_P = -(1 - swapped) * logsigmoid(scaled_P) + swapped * logsigmoid(-scaled_P)
            return unbiased_P / (1 - 2 * swapped)
        case "hinge":
            return torch.relu(1 - scaled_P)
        case "ipo":
            return (margin_P - 1 / (2 * beta)) ** 2


def simpo_loss(chosen_P: Tensor, rejected_P: Tensor, *, beta: float, gamma: float) -> Tensor:
    """-log s(beta (chosen - rejected) - gamma), of mean log-probabilities (arXiv:2405.14734)."""
    return -logsigmoid(beta * (chosen_P - rejected_P) - gamma)


def orpo_loss(chosen_P: Tensor, rejected_P: Tensor, *, beta: float) -> Tensor:
    """Cross-entropy of the chosen answer, plus beta times the odds ratio (arXiv:2403.07691).

        -chosen - beta log s(log_odds(chosen) - log_odds(rejected))

    of mean log-probabilities.
    """
    return -chosen_P - beta * logsigmoid(log_odds(chosen_P) - log_odds(rejected_P))


def log_odds(log_prob_P: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p <= 0, also where p rounds to 0 or to 1; finite up to p = 1."""
    below_P = log_prob_P.clamp(max=SURE)
    return below_P - _log_one_minus_exp(below_P)


def _log_one_minus_exp(value_P: Tensor) -> Tensor:
    """log(1 - exp(value)) of negative values, exact near 0 and far from it.

    Mächler, 2012: "Accurately computing log(1 - exp(-|a|))".
    """
    is_near_P = value_P > -0.6931471805599453
    # Both branches stay finite where the other one is taken, or their gradients would be NaN.
    near_P = torch.log(-torch.expm1(torch.where(is_near_P, value_P, -1.0)))
    far_P = torch.log1p(-torch.exp(torch.where(is_near_P, -1.0, value_P)))
    return torch.where(is_near_P, near_P, far_P)


def kto_loss(
    ratio_S: Tensor,
    is_desirable_S: Tensor,
    z0: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO of each answer (arXiv:2402.01306), by its log-probability minus the reference's.

        desirable     1 - s(beta (ratio - z0))
        undesirable   1 - s(beta (z0 - ratio))

    `z0`: the estimated KL to the reference, see `kto_baseline`.
    """
    sign_S = torch.where(is_desirable_S, 1.0, -1.0).to(ratio_S.dtype)
    weight_S = torch.where(is_desirable_S, desirable_weight, undesirable_weight).to(ratio_S.dtype)
    # 1 - s(x) = s(-x), without the difference of two numbers near 1.
    return weight_S * torch.sigmoid(-beta * sign_S * (ratio_S - z0))


def kto_baseline(total: Tensor, number: Tensor) -> Tensor:
    """z0: the mean ratio of answers to other prompts, at least 0, from the sum and their number."""
    return (total / number.clamp(min=1)).clamp(min=0).detach()


def bradley_terry_loss(
    chosen_P: Tensor, rejected_P: Tensor, *, margin: float = 0.0, center: float = 0.0
) -> Tensor:
    """-log s(chosen - rejected - margin) + center (chosen + rejected)^2, of scores.

    The second part keeps scores around 0 (Eisenstein et al., 2023, arXiv:2312.09244).
    """
    return -logsigmoid(chosen_P - rejected_P - margin) + center * (chosen_P + rejected_P) ** 2
