"""How far a difference between models may be chance: the paired bootstrap.

One pair of models is the case of one seed; `yrun compare` has a pair for each seed.
"""

# B = resamples, S = seeds, Q = questions of a task

from collections.abc import Sequence

import numpy as np

NUM_RESAMPLES = 2_000
NUM_BLOCKS = 16
SHARE_INSIDE = 0.95

Pair = tuple[Sequence[float], Sequence[float]]
"""What two models reached in the questions of one task: before and after, or one and the other."""


def interval_of_means(tasks: Sequence[Sequence[Pair]], *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean over tasks of `after` minus `before`, in a pair for each seed.

    Seeds, and the questions of each task among themselves, are drawn anew with replacement, the
    same for both models of a pair; the interval holds the middle of the mean differences (Efron,
    1979). So it says what other seeds and other questions of the same kind would give; with one
    seed it speaks of the questions alone. The draws hang on `seed`.
    """
    generator = np.random.default_rng(seed)
    num_seeds = len(tasks[0])
    seeds_BS = generator.multinomial(num_seeds, [1 / num_seeds] * num_seeds, NUM_RESAMPLES)
    total_B = np.zeros(NUM_RESAMPLES)
    for pairs in tasks:
        change_SQ = np.array([after for _, after in pairs], float)
        change_SQ -= np.array([before for before, _ in pairs], float)
        assert change_SQ.size > 0, "at least one question"
        # In blocks, since a task of a benchmark may have thousands of questions.
        blocks = np.array_split(seeds_BS / num_seeds, NUM_BLOCKS)
        total_B += np.concatenate([_drawn(generator, block, change_SQ) for block in blocks])
    outside = (1 - SHARE_INSIDE) / 2
    low, high = np.quantile(total_B / len(tasks), (outside, 1 - outside))
    return float(low), float(high)


def _drawn(
    generator: np.random.Generator, seeds_BS: np.ndarray, change_SQ: np.ndarray
) -> np.ndarray:
    """The mean change in each resample, of which each row of `seeds_BS` has the shares of seeds."""
    num_questions = change_SQ.shape[1]
    questions_BQ = generator.integers(num_questions, size=(len(seeds_BS), num_questions))
    return np.take_along_axis(seeds_BS @ change_SQ, questions_BQ, axis=1).mean(axis=1)
