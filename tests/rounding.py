"""How far rounding alone takes two results apart that are equal on paper.

In which order a kernel adds depends on the processor, the threads and the shape of the tensors. A
tolerance that was read off one machine is a coin toss on the next one; these follow from the sums.
"""

import math

import torch


def rounding(size: float, terms: int = 1, dtype: torch.dtype = torch.float32) -> float:
    """How far two sums of as many terms may be apart, each term rounded to `dtype` at this `size`.

    A term is off by at most size * eps / 2. The signs are random, so errors grow with the root of
    their number; two sums, and four times that root, are further apart in less than one of 10^6.
    """
    return 4 * torch.finfo(dtype).eps * math.sqrt(terms) * size
