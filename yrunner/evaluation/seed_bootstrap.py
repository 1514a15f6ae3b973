"""How far two arms differ, and how sure that is: a paired bootstrap over seeds and questions."""

# B = resamples, S = seeds, Q = questions of a group

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Scores = Mapping[str, Sequence[float]]
"""A figure of one model before it is averaged: a score per question, in groups that count alike
(the tasks of a side, for example)."""

NUM_RESAMPLES = 4_000
TAILS = (0.025, 0.975)


@dataclass(frozen=True)
class Difference:
    """A mean difference and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds 0, so that nothing was shown."""
        return self.low <= 0 <= self.high


def mean_score(scores: Scores) -> float:
    """The mean over groups of the mean over the questions of each."""
    return float(np.mean([np.mean(group) for group in scores.values()]))


def paired_difference(first: Sequence[Scores], second: Sequence[Scores]) -> Difference:
    """`second` minus `first`, seed by seed and question by question.

    Seeds, and the questions of each group, are drawn again with replacement, the same for both,
    so the interval says what other seeds and other questions of the same kind would give. With
    one seed it speaks of the questions alone. The draws have a fixed seed.
    """
    assert first and len(first) == len(second), "pairs of the same seeds"
    generator = np.random.default_rng(0)
    seeds_BS = _drawn(generator, len(first))
    means, total_B = [], np.zeros(NUM_RESAMPLES)
    for group in first[0]:
        difference_SQ = np.array([scores[group] for scores in second]) - np.array(
            [scores[group] for scores in first]
        )
        questions_BQ = _drawn(generator, difference_SQ.shape[1])
        total_B += np.einsum("bs,sq,bq->b", seeds_BS, difference_SQ, questions_BQ, optimize=True)
        means.append(difference_SQ.mean())
    low, high = np.quantile(total_B / len(means), TAILS)
    return Difference(float(np.mean(means)), float(low), float(high))


def _drawn(generator: np.random.Generator, number: int) -> np.ndarray:
    """For each resample, the share of the draws that fell on each of `number` things."""
    return generator.multinomial(number, np.full(number, 1 / number), size=NUM_RESAMPLES) / number
