"""How well a text reads, as far as counting can tell: repetition, variety, density.

The pieces that are counted are words, numbers, Chinese characters and signs, not the tokens of a
model: so the texts of models with different tokenizers can be compared.
"""

import zlib
from collections import Counter
from collections.abc import Sequence

from yrunner.evaluation.words import pieces_of

WINDOW = 50
"""Pieces over which a repeat counts; see `windowed_repetition`."""


def text_quality(text: str) -> dict[str, float]:
    """All figures of one text."""
    pieces = pieces_of(text)
    return {
        "repetition_3": repetition(pieces, 3),
        "repetition_4": repetition(pieces, 4),
        "windowed_repetition": windowed_repetition(pieces),
        "distinct_1": distinct(pieces, 1),
        "distinct_2": distinct(pieces, 2),
        "density": density(text),
        "length": float(len(pieces)),
    }


def repetition(pieces: Sequence[str], size: int) -> float:
    """The share of all n-grams of `size` that occur more than once; 0 where there is none."""
    counts = Counter(_ngrams(pieces, size))
    repeated = sum(count for count in counts.values() if count > 1)
    return repeated / counts.total() if counts else 0.0


def windowed_repetition(pieces: Sequence[str], size: int = 4, window: int = WINDOW) -> float:
    """How densely a text repeats itself, from 0 to almost 1.

    An n-gram that follows its like at a distance of d pieces counts 1 - (d - 1) / window, and
    nothing from `window` + 1 on; the sum is divided by the number of n-grams. So code may call a
    function again, and a model that says one thing over and over is found.
    """
    ngrams = _ngrams(pieces, size)
    last: dict[tuple[str, ...], int] = {}
    total = 0.0
    for place, ngram in enumerate(ngrams):
        if ngram in last:
            total += max(0.0, 1 - (place - last[ngram] - 1) / window)
        last[ngram] = place
    return total / len(ngrams) if ngrams else 0.0


def distinct(pieces: Sequence[str], size: int) -> float:
    """Different n-grams over all n-grams (Li et al., 2016); 1 where there is none."""
    ngrams = _ngrams(pieces, size)
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def density(text: str) -> float:
    """Compressed size over size in bytes, at most 1: low where little new is said."""
    size = len(text.encode())
    return min(1.0, len(zlib.compress(text.encode(), 9)) / size) if size else 1.0


def _ngrams(pieces: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return list(zip(*(pieces[start:] for start in range(size)), strict=False))
