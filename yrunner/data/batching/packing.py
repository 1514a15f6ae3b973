"""Pack short examples into full rows: best-fit decreasing, nothing split and nothing dropped."""

# Shapes: E = examples, P = packs

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Packs:
    """Examples that share a row. Iterating yields the examples of each pack."""

    examples_E: Integers
    """The examples, pack by pack."""
    ends_P: Integers
    """The end of each pack in `examples_E`."""

    def __len__(self) -> int:
        return len(self.ends_P)

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for end in self.ends_P.tolist():
            yield self.examples_E[start:end].tolist()
            start = end

    def shuffled(self, lengths: Sequence[int] | Integers, seed: Sequence[int]) -> "Packs":
        """Exchange examples of equal length at random, and shuffle the packs.

        So each epoch has different packs, but as many of them.
        """
        generator = np.random.default_rng(seed)
        lengths_E = np.asarray(lengths)
        shuffled_E = generator.permutation(len(lengths_E))
        examples_E = np.empty_like(self.examples_E)
        places_E = np.argsort(lengths_E[self.examples_E], kind="stable")
        examples_E[places_E] = shuffled_E[np.argsort(lengths_E[shuffled_E], kind="stable")]
        packs_P = generator.permutation(len(self))
        return Packs(examples_E, self.ends_P)._select(packs_P)

    def _select(self, packs_P: Integers) -> "Packs":
        sizes_P = np.diff(self.ends_P, prepend=0)
        starts_P, sizes_P = (self.ends_P - sizes_P)[packs_P], sizes_P[packs_P]
        ends_P = sizes_P.cumsum()
        moved_E = np.repeat(starts_P - (ends_P - sizes_P), sizes_P)
        return Packs(self.examples_E[moved_E + np.arange(len(moved_E))], ends_P)


def pack(lengths: Sequence[int] | Integers, space: int) -> Packs:
    """Pack examples of these lengths, 1 to `space` tokens, into rows of `space` tokens.

    Best-fit decreasing (Johnson, 1973): from the longest to the shortest, each goes to the fullest
    pack that has room for it. At most 11/9 of the fewest possible packs, and one.
    """
    lengths_E = _checked(lengths, space)
    examples_E = np.argsort(-lengths_E, kind="stable")
    pack_of_E = np.array(_best_fit(lengths_E[examples_E].tolist(), space), np.int64)
    return Packs(examples_E[np.argsort(pack_of_E, kind="stable")], np.bincount(pack_of_E).cumsum())


def pack_in_order(lengths: Sequence[int] | Integers, space: int) -> Packs:
    """Pack consecutive examples only (next-fit): at most twice the fewest possible packs."""
    ends: list[int] = []
    used = space
    for example, length in enumerate(_checked(lengths, space).tolist()):
        if used + length > space:
            ends.append(example)
            used = 0
        used += length
    ends_P = np.array([*ends[1:], len(lengths)], np.int64)
    return Packs(np.arange(len(lengths)), ends_P)


def fill_rate(lengths: Sequence[int] | Integers, num_packs: int, space: int) -> float:
    """The share of the tokens of `num_packs` rows that are not padding."""
    return float(np.sum(lengths, dtype=np.int64)) / (num_packs * space)


def _checked(lengths: Sequence[int] | Integers, space: int) -> Integers:
    lengths_E = np.asarray(lengths, np.int64)
    assert len(lengths_E), "there are no examples to pack"
    assert lengths_E.min() > 0 and lengths_E.max() <= space, "an example fits in no row"
    return lengths_E


def _best_fit(lengths: Sequence[int], space: int) -> list[int]:
    """The pack of each example; packs are numbered as they are opened."""
    packs_with: defaultdict[int, list[int]] = defaultdict(list)
    """Packs by the space left in them."""
    rooms = 0
    """A bit set: bit r is 1 if `packs_with[r]` is not empty."""
    num_packs = 0
    pack_of: list[int] = []
    for length in lengths:
        enough = rooms >> length
        if enough:
            left = (enough & -enough).bit_length() - 1
            packs = packs_with[left + length]
            chosen = packs.pop()
            if not packs:
                rooms ^= 1 << (left + length)
        else:
            chosen, left = num_packs, space - length
            num_packs += 1
        packs_with[left].append(chosen)
        rooms |= 1 << left
        pack_of.append(chosen)
    return pack_of


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices, the longest first, in batches of at most `max_tokens` when padded, or of one row.

    Longest first: too little memory shows at once, and the time left is not underestimated.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches = []
    start = 0
    while start < len(order):
        size = max(1, max_tokens // max(1, lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches
