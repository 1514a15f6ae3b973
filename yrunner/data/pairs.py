"""Rows to read side by side: other answers to one prompt, exact and near duplicates."""

# E = examples, S = shingles of all of them, H = hash functions

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from yrunner.data.store import Examples

PairKind = Literal["conflict", "duplicate", "near"]

SHINGLE = 3
"""Neighbouring tokens that count as one: two texts are alike where they share many of these."""
NUM_BANDS, BAND = 8, 8
"""Of 64 hashes, 8 of any band have to agree: 99 % of the pairs that are 0.9 alike are found, 77 %
of those that are 0.8 alike."""
LEAST_LIKENESS = 0.8
"""Shared shingles over all shingles of both, from which on two rows are near duplicates."""

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Pair:
    """Two rows that say the same, or contradict each other."""

    kind: PairKind
    first: int
    """Index of the earlier row."""
    second: int
    likeness: float
    """Share of their shingles that both have; 1 for exact duplicates."""


def find_pairs(examples: Examples) -> list[Pair]:
    """All conflicts and exact duplicates, each paired with the first of its kind, in their order;
    then near duplicates, the most alike first.

    Near duplicates are found by hashing, in time that is linear in the tokens: a few are missed,
    and of a large group not every row is paired with every other.
    """
    contents, prompts = (examples.column(name).tolist() for name in ("contents", "prompts"))
    start = count_common_start(examples)
    shingles = [_shingles(np.array(example.input_ids[start:])) for example in examples]
    pairs = [*_same_key("conflict", prompts, contents), *_same_key("duplicate", contents)]
    told = {(first, second) for _, first, second in pairs}
    first_of = {content: index for index, content in reversed([*enumerate(contents)])}
    rows = sorted(index for index in first_of.values() if len(shingles[index]))
    alike = [
        Pair("near", first, second, likeness)
        for first, second in sorted(_candidates(rows, shingles) - told)
        if (likeness := _likeness(shingles[first], shingles[second])) >= LEAST_LIKENESS
    ]
    return [
        *(
            Pair(kind, first, second, _likeness(shingles[first], shingles[second]))
            for kind, first, second in pairs
        ),
        *sorted(alike, key=lambda pair: -pair.likeness),
    ]


def count_common_start(examples: Examples) -> int:
    """Tokens that all examples begin with, such as a system prompt."""
    common: list[int] = examples[0].input_ids if len(examples) else []
    for example in examples:
        # Most examples share all that is left: then one comparison is enough.
        if example.input_ids[: len(common)] != common:
            both = zip(common, example.input_ids, strict=False)
            common = common[: next((n for n, (one, other) in enumerate(both) if one != other), 0)]
    return len(common)


def _same_key(
    kind: PairKind, keys: Sequence[int], contents: Sequence[int] | None = None
) -> Iterator[tuple[PairKind, int, int]]:
    """The first row of each key with every later one; only with other contents if they are given,
    and each content once."""
    first_of: dict[int, int] = {}
    met: set[tuple[int, int]] = set()
    for index, key in enumerate(keys):
        first = first_of.setdefault(key, index)
        if contents is not None:
            if (key, contents[index]) in met:
                continue
            met.add((key, contents[index]))
        if first != index:
            yield kind, first, index


def _shingles(ids: NDArray[Any]) -> Hashes:
    """A hash of every three neighbouring tokens, each once, in order of size."""
    if len(ids) < SHINGLE:
        return np.empty(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), SHINGLE)
    # The multiplication wraps around on purpose; the shift makes it more than a weighted sum.
    hashed = windows @ _odd_numbers(SHINGLE, seed=1)
    return np.unique(hashed ^ hashed >> np.uint64(29))


def _candidates(rows: Sequence[int], shingles: Sequence[Hashes]) -> set[tuple[int, int]]:
    """Rows that agree in a whole band of their smallest hashes, each with the one before it."""
    if not rows:
        return set()
    sizes = [len(shingles[row]) for row in rows]
    starts = np.cumsum([0, *sizes[:-1]])
    shingle_S = np.concatenate([shingles[row] for row in rows])
    odd_H = _odd_numbers(NUM_BANDS * BAND, seed=2)
    found = set()
    for band_H in np.split(odd_H, NUM_BANDS):
        smallest = [np.minimum.reduceat(shingle_S * odd, starts) for odd in band_H]
        keys = np.stack(smallest, axis=1) @ band_H
        order = np.argsort(keys, kind="stable").tolist()
        for _, group in groupby(order, keys.tolist().__getitem__):
            found |= {(rows[first], rows[second]) for first, second in pairwise(group)}
    return found


def _odd_numbers(count: int, seed: int) -> Hashes:
    random = np.random.default_rng(seed)
    return random.integers(0, 2**64, count, np.uint64, endpoint=False) | np.uint64(1)


def _likeness(left: Hashes, right: Hashes) -> float:
    """Jaccard's index of two sets of shingles; 1 where both are too short to have any."""
    num_shared = len(np.intersect1d(left, right, assume_unique=True))
    num_all = len(left) + len(right) - num_shared
    return num_shared / num_all if num_all else 1.0
