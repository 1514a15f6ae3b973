"""Which drafts are of no use: cut off, empty, stuck in a loop, or said before."""

from collections import Counter, defaultdict
from typing import Literal

from yrunner.evaluation.drafts import Draft
from yrunner.evaluation.text_quality import windowed_repetition
from yrunner.evaluation.words import pieces_of, units_of

Fault = Literal["unfinished", "empty", "loop", "duplicate"]
FAULTS: tuple[Fault, ...] = ("unfinished", "empty", "loop", "duplicate")

LOOP = 0.3
"""Windowed repetition of a text that is stuck. The highest of the rows in recipes/data is 0.2."""
ALIKE = 0.8
"""Share of the 3-grams of two texts that both have, from which on one is a copy of the other."""
SIZE = 3

Shingles = frozenset[tuple[str, ...]]


class Known:
    """The texts that were kept so far; looks for one that is nearly the same."""

    def __init__(self) -> None:
        self.shingles: list[Shingles] = []
        self.rows_with: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, text: str) -> None:
        """Remember a text."""
        shingles = shingles_of(text)
        for shingle in shingles:
            self.rows_with[shingle].append(len(self.shingles))
        self.shingles.append(shingles)

    def has(self, text: str) -> bool:
        """Whether a known text is nearly the same: of all their 3-grams, both have most."""
        shingles = shingles_of(text)
        common = Counter(row for shingle in shingles for row in self.rows_with.get(shingle, ()))
        return any(
            number >= ALIKE * (len(shingles) + len(self.shingles[row]) - number)
            for row, number in common.items()
        )


def shingles_of(text: str) -> Shingles:
    """The 3-grams of a text's words, numbers and Chinese characters; of a short one, all of it."""
    units = units_of(text) or pieces_of(text)
    places = range(max(1, len(units) - SIZE + 1))
    return frozenset(tuple(units[place : place + SIZE]) for place in places)


def find_fault(draft: Draft, known: Known) -> Fault | None:
    """Why a draft is dropped; None where it can be kept."""
    if not draft.finished:
        return "unfinished"
    if not all(message.content for message in draft.messages):
        return "empty"
    if windowed_repetition(pieces_of(draft.text)) > LOOP:
        return "loop"
    return "duplicate" if known.has(draft.text) else None
