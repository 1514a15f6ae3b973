"""How far a difference between two models may be chance: the paired bootstrap."""

# Q = questions of a task

from collections.abc import Sequence

import numpy as np

SHARE_INSIDE = 0.95


def paired_interval(
    before: Sequence[float], after: Sequence[float], *, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """The 95 % interval of the mean of `after` minus that of `before`, paired over questions.

    Questions are drawn anew, with replacement, `resamples` times; the interval holds the middle of
    the mean differences (Efron, 1979). Both models answered the same questions, in one order.
    """
    return interval_of_means([(before, after)], seed=seed, resamples=resamples)


def interval_of_means(
    tasks: Sequence[tuple[Sequence[float], Sequence[float]]],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> tuple[float, float]:
    """The same for the mean over tasks; the questions of each task are drawn among themselves."""
    differences = []
    for before, after in tasks:
        assert len(before) == len(after) > 0, "the same questions, and at least one"
        differences.append(np.asarray(after, float) - np.asarray(before, float))
    generator = np.random.default_rng(seed)
    means = [
        np.mean([generator.choice(change_Q, len(change_Q)).mean() for change_Q in differences])
        for _ in range(resamples)
    ]
    outside = (1 - SHARE_INSIDE) / 2
    low, high = np.quantile(means, (outside, 1 - outside))
    return float(low), float(high)
