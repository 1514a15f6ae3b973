"""Policy gradients over sampled answers: advantages of a group or by a critic, clipped ratios, KL.

Nothing here divides by the size of a batch: `shares` gives each target's part in an update.
"""

# Shapes: P = prompts, G = answers to each, S = answers, N = their targets, T = tokens of an answer

from collections.abc import Sequence
from statistics import StatisticsError
from statistics import correlation as pearson
from typing import Literal

import torch
from torch import Tensor

Ratio = Literal["token", "mean", "answer"]
"""What a probability ratio is of: a token, the geometric mean of an answer's, a whole answer."""
Normalize = Literal["sequence", "tokens", "length"]

TINY_DEVIATION = 1e-4
"""Added to the standard deviation of a group, as TRL does."""
TINY_VARIANCE = 1e-8
"""Added to the variance of all advantages of an update."""
CONTRARY = -0.3
"""Correlation of two rewards below which they contradict each other."""


def group_advantages(reward_PG: Tensor, *, scale: Literal["group", "none"]) -> Tensor:
    """How much better each answer is than the mean of its group, shape [P, G].

        (r - mean) / (std + 1e-4)     scale "group": GRPO, arXiv:2402.03300, equation 3
        r - mean                      scale "none": Dr. GRPO, arXiv:2503.20783

    An answer without a reward (NaN) leaves the mean, and has the advantage 0. So has every answer
    of a group whose rewards are all equal.
    """
    centred_PG = reward_PG - reward_PG.nanmean(dim=1, keepdim=True)
    if scale == "group":
        is_rated_PG = ~reward_PG.isnan()
        degrees_P1 = (is_rated_PG.sum(dim=1, keepdim=True) - 1).clamp(min=1)
        variance_P1 = centred_PG.nan_to_num(0.0).square().sum(dim=1, keepdim=True) / degrees_P1
        centred_PG = centred_PG / (variance_P1.sqrt() + TINY_DEVIATION)
    return _zero_without_variance(centred_PG, reward_PG)


def leave_one_out_advantages(reward_PG: Tensor) -> Tensor:
    """How much better each answer is than the mean of the others of its group, shape [P, G].

    RLOO, arXiv:2402.14740, equation 8. Missing and equal rewards: see `group_advantages`.
    """
    is_rated_PG = ~reward_PG.isnan()
    others_P1 = (is_rated_PG.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    mean_of_others_PG = (reward_PG.nansum(dim=1, keepdim=True) - reward_PG) / others_P1
    return _zero_without_variance(reward_PG - mean_of_others_PG, reward_PG)


def is_without_variance(reward_PG: Tensor) -> Tensor:
    """Whether the rewards of a group, but for the missing ones, are all equal; shape [P]."""
    highest_P = reward_PG.nan_to_num(-torch.inf).amax(dim=1)
    lowest_P = reward_PG.nan_to_num(torch.inf).amin(dim=1)
    return highest_P <= lowest_P


def _zero_without_variance(advantage_PG: Tensor, reward_PG: Tensor) -> Tensor:
    # Exactly zero: what rounding leaves of a mean, over a deviation of zero, would be an advantage.
    is_zero_PG = is_without_variance(reward_PG)[:, None] | reward_PG.isnan()
    return advantage_PG.masked_fill(is_zero_PG, 0.0)


def generalized_advantages(
    reward_T: Tensor, value_T: Tensor, *, gamma: float, lam: float
) -> Tensor:
    """How much better each token of an answer was than the critic expected, shape [T].

        A_t = delta_t + gamma lam A_(t+1),   delta_t = r_t + gamma V_(t+1) - V_t

    GAE, arXiv:1506.02438, equation 16. Nothing follows the last token: its successor has the value
    and the advantage 0. What the critic should have expected is A + V.
    """
    advantage_T = torch.empty_like(value_T)
    following = next_value = value_T.new_zeros(())
    for at in reversed(range(len(value_T))):
        surprise = reward_T[at] + gamma * next_value - value_T[at]
        following = advantage_T[at] = surprise + gamma * lam * following
        next_value = value_T[at]
    return advantage_T


def whiten(value_N: Tensor) -> Tensor:
    """Shifted and scaled to mean 0 and variance 1; all 0 where they are all equal."""
    centred_N = value_N - value_N.mean()
    return centred_N / (centred_N.square().mean() + TINY_VARIANCE).sqrt()


def clipped_value_loss(
    value_N: Tensor, old_N: Tensor, return_N: Tensor, *, clip: float
) -> tuple[Tensor, Tensor]:
    """The critic's loss of each target, and whether it is clipped, so that it has no gradient.

        1/2 max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2)

    As in OpenAI's implementation of PPO; see arXiv:2005.12729, section 3.
    """
    bounded_N = torch.maximum(torch.minimum(value_N, old_N + clip), old_N - clip)
    square_N, bounded_square_N = (value_N - return_N).square(), (bounded_N - return_N).square()
    is_moved_N = (value_N - old_N).abs() > clip
    is_clipped_N = is_moved_N & (bounded_square_N > square_N)
    return torch.maximum(square_N, bounded_square_N) / 2, is_clipped_N.detach()


def explained_variance(value_N: Tensor, return_N: Tensor) -> float | None:
    """1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for a constant one, below 0 for a worse.

    None where the returns are all equal.
    """
    if len(return_N) == 0:
        return None
    variance = float(return_N.var(correction=0))
    if not variance > 0:
        return None
    return 1 - float((return_N - value_N).var(correction=0)) / variance


def log_ratios(
    log_prob_N: Tensor, old_N: Tensor, answer_N: Tensor, num_targets_S: Tensor, ratio: Ratio
) -> Tensor:
    """The log of the probability ratio that each target is weighed by, shape [N]; differentiable.

    token   log p - log p_old                    PPO, arXiv:1707.06347
    mean    its mean over the answer             GSPO, arXiv:2507.18071, equation 7
    answer  its sum over the answer              REINFORCE on whole answers, arXiv:2402.14740
    """
    change_N = log_prob_N - old_N
    if ratio == "token":
        return change_N
    sum_S = change_N.new_zeros(len(num_targets_S)).index_add(0, answer_N, change_N)
    if ratio == "mean":
        sum_S = sum_S / num_targets_S.clamp(min=1)
    return sum_S[answer_N]


def clipped_surrogate(
    log_ratio_N: Tensor, advantage_N: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's loss of each target, and whether it is clipped, so that it has no gradient.

        -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)     arXiv:1707.06347, equation 7

    Two bounds: DAPO, arXiv:2503.14476, equation 8.
    """
    ratio_N = log_ratio_N.exp()
    bounded_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    loss_N = -torch.minimum(ratio_N * advantage_N, bounded_N * advantage_N)
    too_low_N = (ratio_N < 1 - clip_low) & (advantage_N < 0)
    too_high_N = (ratio_N > 1 + clip_high) & (advantage_N > 0)
    return loss_N, (too_low_N | too_high_N).detach()


def k3_divergence(log_prob_N: Tensor, reference_N: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) from each sampled token, never negative.

    exp(d) - d - 1,   d = log p_reference - log p     arXiv:2402.03300, equation 4
    """
    difference_N = reference_N - log_prob_N
    return difference_N.exp() - difference_N - 1


def shares(num_targets_S: Tensor, normalize: Normalize, *, max_length: int) -> Tensor:
    """The part of each target of an answer in the loss of an update of these answers, shape [S].

    sequence  1 / (answers x targets of the answer)     GRPO: every answer counts alike
    tokens    1 / (targets of all answers)              DAPO: every token counts alike
    length    1 / (answers x max_length)                Dr. GRPO: length does not count

    An answer that is masked has 0 targets and a share of no consequence.
    """
    counts_S = num_targets_S.double()
    match normalize:
        case "sequence":
            return 1 / (len(counts_S) * counts_S.clamp(min=1))
        case "tokens":
            return torch.full_like(counts_S, 1 / float(counts_S.sum().clamp(min=1)))
        case "length":
            return torch.full_like(counts_S, 1 / (len(counts_S) * max_length))


def correlation(one: Sequence[float | None], other: Sequence[float | None]) -> float | None:
    """Pearson's correlation of two rewards over the answers that both have scored.

    None where that are fewer than two, or one of the rewards is constant.
    """
    pairs = zip(one, other, strict=True)
    both = [(x, y) for x, y in pairs if x is not None and y is not None]
    try:
        return pearson([x for x, _ in both], [y for _, y in both])
    except StatisticsError:
        return None
