"""Texts that are cut into parts, to tokens: no token reaches over a cut.

The first part of a conversation is its prompt, so it gets exactly the tokens that it has at
inference, where the model writes the next part on its own.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate, chain, pairwise
from operator import itemgetter
from typing import Any

from yrunner.data.chat_template import Span
from yrunner.errors import ModelError

MARKERS = ("\n", "。", "\x00")
"""Texts to tokenize a part behind, so that it is no beginning of a text; one token or more."""

Tokens = tuple[list[int], list[Span]]
"""Ids, and the characters that each stands for."""


class PartTokenizer:
    """Gives each part the tokens that it has behind the parts before it.

    Most tokenizers can take each part by itself. Some (Llama 2's, Phi-3's) write a blank before
    whatever text they get; there the whole text is tokenized and cut only where a token lies
    across a cut. Raises `ModelError` for a tokenizer that does not tell where its tokens stand.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} does not tell where in a text its tokens stand",
                remedy="use a model whose folder holds a tokenizer.json",
            )
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer.json may hold both; transformers, too, sets them anew for each of its calls.
        self._backend.no_padding()
        self._backend.no_truncation()
        apart = self._tokens("\n")[0] + self._tokens("a")[0]
        self._parts_stand_alone = self._tokens("\na")[0] == apart

    def tokenize(self, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """The ids of every part of every row."""
        if not self._parts_stand_alone:
            return [self._cut_where_needed(row, self._tokens) for row in rows]
        # Line ends behind turns and the like are the same in every row.
        parts = [part for part in dict.fromkeys(chain.from_iterable(rows)) if part]
        encodings = self._backend.encode_batch_fast(parts, add_special_tokens=False)
        ids = {part: encoding.ids for part, encoding in zip(parts, encodings, strict=True)}
        ids[""] = []
        return [[ids[part] for part in row] for row in rows]

    def _tokens(self, text: str) -> Tokens:
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _tokens_behind_a_text(self, text: str) -> Tokens:
        """The tokens of a text that is no beginning."""
        for marker in MARKERS:
            ids, offsets = self._tokens(marker + text)
            marker_ids, _ = self._tokens(marker)
            place = len(marker_ids)
            shifted = [(start - len(marker), end - len(marker)) for start, end in offsets[place:]]
            if ids[:place] == marker_ids and (not shifted or shifted[0][0] == 0):
                return ids[place:], shifted
        return self._tokens(text)

    def _cut_where_needed(
        self, parts: Sequence[str], tokens_of: Callable[[str], Tokens]
    ) -> list[list[int]]:
        """The ids of parts that are tokenized as one text but for the cuts that a token crosses."""
        ids, offsets = tokens_of("".join(parts))
        places = [_first_behind(offsets, cut) for cut in accumulate(map(len, parts))]
        cuts = [number for number, place in enumerate(places[:-1], start=1) if place is None]
        if cuts:
            found = self._cut_where_needed(parts[: cuts[0]], tokens_of)
            for start, end in pairwise([*cuts, len(parts)]):
                found += self._cut_where_needed(parts[start:end], self._tokens_behind_a_text)
            return found
        ends = [place for place in places[:-1] if place is not None] + [len(ids)]
        return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _first_behind(offsets: Sequence[Span], cut: int) -> int | None:
    """The first token behind a cut; None where a token may lie across it.

    Blanks that no token claims may belong to a token of either side.
    """
    place = bisect_left(offsets, cut, key=itemgetter(0))
    end = offsets[place - 1][1] if place else 0
    start = offsets[place][0] if place < len(offsets) else cut
    return place if end == cut == start else None
