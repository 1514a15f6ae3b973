"""An example cut into what is shown as one: stretches of context, and targets as characters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from yrunner.data.conversation import TokenizedExample
from yrunner.reports.token_text import INCOMPLETE, TokenText, visible
from yrunner.tokens import IGNORE_INDEX


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens with one text."""

    text: str
    """Harmful characters are made visible."""
    is_special: bool
    num_targets: int
    """0 for context; more than one where a character is made of several targets."""


def pieces_of(example: TokenizedExample, text: TokenText) -> list[Piece]:
    """The tokens of an example as pieces, in order; context that looks alike is one."""
    parts = [
        _piece(ids, before, sum(label != IGNORE_INDEX for label in labels), text)
        for ids, labels, before in _characters(example, text)
    ]
    pieces: list[Piece] = []
    for (is_target, is_special), run in groupby(parts, lambda p: (p.num_targets > 0, p.is_special)):
        alike = list(run)
        merged = Piece("".join(piece.text for piece in alike), is_special, 0)
        pieces += alike if is_target else [merged]
    return pieces


def top_texts(example: TokenizedExample, top_ids: Sequence[int], text: TokenText) -> list[str]:
    """What stands in the place of each target if the token of `top_ids` does.

    Inside a character that is what it becomes; empty for a token that leaves it half.
    """
    tops = iter(top_ids)
    return [
        _top_text(ids[:number], next(tops), before, text)
        for ids, labels, before in _characters(example, text)
        for number, label in enumerate(labels)
        if label != IGNORE_INDEX
    ]


def _characters(
    example: TokenizedExample, text: TokenText
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """The ids and labels of each character, and the ids before it."""
    place = 0
    before: list[int] = []
    for ids in text.characters(example.input_ids):
        yield ids, example.labels[place : place + len(ids)], before
        place += len(ids)
        before = ids


def _piece(ids: list[int], before: list[int], num_targets: int, text: TokenText) -> Piece:
    is_special = ids[0] in text.special_ids
    # A token without a text still has to be seen.
    shown = "" if is_special else text.decode(ids, before)
    return Piece(visible(shown or text.names(ids)), is_special, num_targets)


def _top_text(begun: list[int], top: int, before: list[int], text: TokenText) -> str:
    if top in text.special_ids:
        return visible(text.names([top]))
    shown = text.decode([*begun, top], before)
    return "" if shown.endswith(INCOMPLETE) else visible(shown or text.names([top]))
