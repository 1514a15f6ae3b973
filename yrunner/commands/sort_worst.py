"""The worst span of a row as text, with what stands around it."""

from collections.abc import Sequence
from dataclasses import dataclass

from yrunner.commands.sort_corpus import CorpusRow
from yrunner.data.store import Examples
from yrunner.reports.token_text import (
    INCOMPLETE,
    LINE_END,
    MOST_TOKENS_OF_A_CHARACTER,
    TokenText,
)
from yrunner.reports.token_view import CLOSED, OPENED
from yrunner.scoring.spans import Span

SHOWN_CHARACTERS = 24
"""What is shown on each side of a span."""
LONGEST_SPAN = 80
"""Characters of the span itself."""


@dataclass(frozen=True)
class MarkedSpan:
    """A stretch of what is learned from a row, and its surroundings."""

    before: str
    marked: str
    after: str

    def line(self) -> str:
        """All on one line, the stretch in brackets, the far ends left out."""
        before, after = self.before[-SHOWN_CHARACTERS:], self.after[:SHOWN_CHARACTERS]
        if len(before) < len(self.before):
            before = f"…{before}"
        if len(after) < len(self.after):
            after = f"{after}…"
        marked = self.marked
        if len(marked) > LONGEST_SPAN:
            marked = f"{marked[:LONGEST_SPAN]}…"
        return f"{before}{OPENED}{marked}{CLOSED}{after}".replace("\n", LINE_END)


def mark_span(row: CorpusRow, span: Span, examples: Examples, text: TokenText) -> MarkedSpan:
    """The targets of the row with the span marked, grown to whole characters."""
    ids: list[int] = []
    for place in row.examples:
        example = examples[place]
        ids += [example.labels[position] for position in example.target_positions]
    start = _whole(ids, span.start, -1, text)
    end = _whole(ids, span.end, 1, text)
    before, marked, after = ids[:start], ids[start:end], ids[end:]
    return MarkedSpan(
        text.decode(before), text.decode(marked, before), text.decode(after, ids[:end])
    )


def _whole(ids: Sequence[int], border: int, step: int, text: TokenText) -> int:
    """The next border that lies between two characters; the border itself where there is none."""
    for moved in range(MOST_TOKENS_OF_A_CHARACTER):
        place = border + step * moved
        if place in (0, len(ids)) or not text.decode(ids[:place]).endswith(INCOMPLETE):
            return place
    return border
