"""Tokens as text that people can read: whole characters, line ends and harmful signs visible."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from yrunner.console import printable

LINE_END = "↵"
INCOMPLETE = "\ufffd"
"""What a decoder writes for the bytes of half a character."""
MOST_TOKENS_OF_A_CHARACTER = 8
"""More tokens than this are no character, but bytes that will never make one."""


class TokenText:
    """The texts of a tokenizer's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def decode(self, ids: Sequence[int], before: Sequence[int] = ()) -> str:
        """The text of tokens behind the tokens `before`.

        Some tokenizers leave out the blank that a text begins with, so these are decoded as well.
        """
        known, whole = (self._decode(part) for part in ([*before], [*before, *ids]))
        # Where it does not, the border lies inside a character.
        return whole[len(known) :] if whole.startswith(known) else self._decode([*ids])

    def names(self, ids: Sequence[int]) -> str:
        """What the tokenizer calls the tokens, as special ones are shown."""
        return "".join(self.tokenizer.convert_ids_to_tokens([*ids]))

    def characters(self, ids: Sequence[int]) -> Iterator[list[int]]:
        """The tokens one by one, but those together that only together make characters."""
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
        """Ids of the tokens that no text is made of."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {*self.tokenizer.all_special_ids, *(id_ for id_, token in added if token.special)}

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def visible(text: str) -> str:
    """The text with a sign before each line end, and harmful characters as escapes."""
    # Line by line: `printable` takes the return before a line feed away, but the model sees it.
    return f"{LINE_END}\n".join(map(printable, text.split("\n")))
