"""Tokens as readable text: whole characters, with line ends and control characters visible."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from yrunner.console import printable
from yrunner.data.conversation import TokenizedExample
from yrunner.tokens import IGNORE_INDEX

LINE_END = "↵"
INCOMPLETE = "\ufffd"
"""A decoder writes this for an incomplete character."""
MOST_TOKENS_OF_A_CHARACTER = 8
"""More tokens than this never make a character."""


class TokenText:
    """The texts of a tokenizer's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def decode(self, ids: Sequence[int], before: Sequence[int] = ()) -> str:
        """The text of tokens after the tokens `before`.

        These are decoded as well, since some tokenizers omit a blank at the start of a text.
        """
        known, whole = (self._decode(part) for part in ([*before], [*before, *ids]))
        # If not, the boundary is inside a character.
        return whole[len(known) :] if whole.startswith(known) else self._decode([*ids])

    def names(self, ids: Sequence[int]) -> str:
        """The tokenizer's names of the tokens, for special ones."""
        return "".join(self.tokenizer.convert_ids_to_tokens([*ids]))

    def characters(self, ids: Sequence[int]) -> Iterator[list[int]]:
        """The tokens one by one, but grouped where only together they make a character."""
        open_ids: list[int] = []
        before: list[int] = []
        for id_ in ids:
            if open_ids and id_ in self.special_ids:
                yield open_ids
                open_ids, before = [], open_ids
            open_ids = [*open_ids, id_]
            is_whole = not self.decode(open_ids, before).endswith(INCOMPLETE)
            if is_whole or len(open_ids) == MOST_TOKENS_OF_A_CHARACTER:
                yield open_ids
                open_ids, before = [], open_ids
        if open_ids:
            yield open_ids

    @cached_property
    def special_ids(self) -> set[int]:
        """Ids of the special tokens."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {*self.tokenizer.all_special_ids, *(id_ for id_, token in added if token.special)}

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def visible(text: str) -> str:
    """The text with a sign before each line end, and control characters as escapes."""
    # Line by line: `printable` removes the return before a line feed, but the model sees it.
    return f"{LINE_END}\n".join(map(printable, text.split("\n")))


@dataclass(frozen=True)
class Piece:
    """Adjacent tokens that are shown as one: a character of targets, or a stretch of context."""

    text: str
    """With control characters made visible."""
    is_special: bool
    num_targets: int
    """0 for context; more than one for a character of several targets."""


def pieces_of(example: TokenizedExample, text: TokenText) -> list[Piece]:
    """The tokens of an example as pieces, in order."""
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
    """The text of each target if it were the token of `top_ids`.

    Inside a character, the whole character; empty for a token that leaves it incomplete.
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
    # A token without text must still be visible.
    shown = "" if is_special else text.decode(ids, before)
    return Piece(visible(shown or text.names(ids)), is_special, num_targets)


def _top_text(begun: list[int], top: int, before: list[int], text: TokenText) -> str:
    if top in text.special_ids:
        return visible(text.names([top]))
    shown = text.decode([*begun, top], before)
    return "" if shown.endswith(INCOMPLETE) else visible(shown or text.names([top]))
