"""Better and worse answers among the prepared rows: facts about them, and possible faults."""

# E = pairs or rated answers

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from yrunner.data.dataset.examples import Column, Examples, Pairs, StoredRows
from yrunner.data.dataset.prompts import Prompts
from yrunner.data.dataset.quality import SHOWN_PLACES, Finding, find_oddities, finding

Key = tuple[int, int]
"""The content of a pair or of a rated answer: equal for repeated ones."""

WORDS = {
    True: ("pairs", "contradictory pairs (A over B, B over A)"),
    False: ("answers", "answers that are marked good and bad"),
}
"""What pairs and rated answers are called, and those that contradict each other."""


@dataclass(frozen=True)
class SideFacts:
    """The better answers, or the worse ones."""

    answers: int
    tokens: int
    """With their prompts."""
    targets: int
    mean_length: float
    """Targets per answer."""


@dataclass(frozen=True)
class AnswerFacts:
    """Statistics of pairs, or of answers that are marked good or bad."""

    better: SideFacts
    worse: SideFacts
    prompts: int
    """Different prompts."""
    longer_wins: float | None
    """Share of the pairs whose better answer has more targets; None without pairs."""
    equally_long: float | None
    """Share of the pairs whose answers have as many targets; None without pairs."""
    shared_prompts: int | None
    """Pairs whose answers follow the same tokens; None without pairs."""


def answer_facts(rows: StoredRows[Any]) -> AnswerFacts | None:
    """The facts of pairs or rated answers; None for other rows, and for none."""
    if isinstance(rows, (Examples, Prompts)) or not len(rows):
        return None
    examples = rows.examples
    ratings_E, num_targets_E = examples.column("ratings"), examples.num_targets
    better, worse = (
        _side_facts(examples.select(np.flatnonzero(ratings_E == rating))) for rating in (1, -1)
    )
    is_longer = is_equal = num_shared = None
    if isinstance(rows, Pairs):
        difference_E = num_targets_E[0::2] - num_targets_E[1::2]
        is_longer = float((difference_E > 0).mean())
        is_equal = float((difference_E == 0).mean())
        num_shared = int((rows.chosen.column("shared") > 0).sum())
    prompts = len(np.unique(examples.column("prompts")))
    return AnswerFacts(better, worse, prompts, is_longer, is_equal, num_shared)


def _side_facts(answers: Examples) -> SideFacts:
    targets = int(answers.num_targets.sum())
    mean = targets / len(answers) if len(answers) else 0.0
    return SideFacts(len(answers), int(answers.lengths.sum()), targets, mean)


def find_among_answers(train: StoredRows[Any], validation: StoredRows[Any]) -> list[Finding]:
    """Every kind of finding that occurs among pairs, or among rated answers."""
    return [found for found in _all_findings(train, validation) if found.count]


def _all_findings(train: StoredRows[Any], validation: StoredRows[Any]) -> Iterator[Finding]:
    what, contradictory = WORDS[isinstance(train, Pairs)]
    (keys, opposites), (held_out, held_out_opposites) = _keys(train), _keys(validation)
    place_of = {key: place for place, key in reversed([*enumerate(keys)])}
    repeats = [place_of[key] if place_of[key] < place else None for place, key in enumerate(keys)]
    yield _finding_of_two(f"repeated {what} in train", train, repeats, train)
    against = [place_of.get(key) for key in opposites]
    yield _finding_of_two(f"{contradictory} in train", train, against, train, "keep one of the two")
    known = [place_of.get(key) for key in held_out]
    yield _finding_of_two(f"validation {what} that are also in train", validation, known, train)
    against = [place_of.get(key) for key in held_out_opposites]
    yield _finding_of_two(f"validation {what} that train contradicts", validation, against, train)
    prompts_E = validation.examples.column("prompts")[:: validation.EXAMPLES_EACH]
    is_known_E = np.isin(prompts_E, train.examples.column("prompts"))
    yield finding(f"validation {what} to prompts of train", validation, is_known_E)
    for name, rows in (("train", train), ("validation", validation)):
        yield from find_oddities(name, rows, _oddities(rows))


def _keys(rows: StoredRows[Any]) -> tuple[list[Key], list[Key]]:
    """The key of each row, and of the row that would contradict it."""
    contents_E = rows.examples.column("contents").tolist()
    keys: list[Key]
    if isinstance(rows, Pairs):
        keys = list(zip(contents_E[0::2], contents_E[1::2], strict=True))
        return keys, [(worse, better) for better, worse in keys]
    ratings_E = rows.examples.column("ratings").tolist()
    keys = list(zip(contents_E, ratings_E, strict=True))
    return keys, [(content, -rating) for content, rating in keys]


def _oddities(rows: StoredRows[Any]) -> Column:
    """The flags of each row: those of both answers of a pair."""
    flags = rows.examples.column("oddities").reshape(-1, rows.EXAMPLES_EACH)
    together_E: Column = np.bitwise_or.reduce(flags, axis=1)
    return together_E


def _finding_of_two(
    what: str,
    rows: StoredRows[Any],
    other_E: Sequence[int | None],
    others: StoredRows[Any],
    remedy: str = "",
) -> Finding:
    """The finding about rows with another one, by its place among `others`."""
    found = [(place, other) for place, other in enumerate(other_E) if other is not None]
    shown = found[:SHOWN_PLACES]
    return Finding(
        what,
        len(found),
        tuple(rows.origin(place) for place, _ in shown),
        remedy,
        tuple(others.origin(other) for _, other in shown),
    )
