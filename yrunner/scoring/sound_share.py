"""How many of the most suspicious rows are sound all the same?

Nobody knows which rows are faulty, but most are not, so the middle of the scores is that of sound
rows. A distribution fitted to it tells how many sound rows reach into the upper end by chance (an
empirical null, Efron 2004). Sound rows that a faulty one contradicts are not chance; they are not
counted.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

SHAPE = 3.0
"""Of the gamma distribution of sound rows: skewed to the right, as sums of losses are."""
MIDDLE = np.linspace(0.1, 0.8, 29)
"""Shares of the rows below the scores it is fitted to; most faulty rows are above."""
ROUNDS = 3
"""Fits, each without the faulty rows that the one before expects."""
FEWEST_ROWS = 50
"""Of fewer rows the middle is too rough."""
POINTS = np.linspace(0, 40, 4001)
"""Where the distribution is computed, in units of its scale."""


def expect_sound(suspicions: Sequence[float], number: int) -> int | None:
    """How many of the `number` most suspicious rows are probably sound; None for too few rows.

    `suspicions`: the `outlier` score of every row.
    """
    if len(suspicions) < FEWEST_ROWS or not 0 < number <= len(suspicions):
        return None
    below = _shares_below(POINTS)
    places = np.interp(MIDDLE, below, POINTS)
    border = np.sort(suspicions)[-number]
    sound = float(number)
    for _ in range(ROUNDS):
        # Sound rows fill the lower end: the faulty ones among the worst are not part of it.
        share_of_sound = 1 - (number - sound) / len(suspicions)
        scale, start = np.polyfit(places, np.quantile(suspicions, MIDDLE * share_of_sound), deg=1)
        if scale <= 0:
            return number  # all rows are alike
        above = 1 - float(np.interp((border - start) / scale, POINTS, below))
        sound = min(number, above * share_of_sound * len(suspicions))
    return round(sound)


def _shares_below(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distribution function of the gamma distribution."""
    shares = torch.special.gammainc(torch.tensor(SHAPE).double(), torch.from_numpy(points))
    return np.asarray(shares)
