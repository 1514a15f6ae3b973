"""The quick way to the same spans: what a template writes depends on who speaks, rarely on what.

So it is learned once for each order of roles, from a conversation of stand-ins. The rendering of a
row that consists of the same pieces has its turns in the same places between them; a row that does
not is left to the slower way of `spans.py`, which asks the template again for every row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from yrunner.data.chat_template import Chat, Span, render_all, render_or_fault
from yrunner.data.conversation import FaultyRow
from yrunner.data.spans import (
    closed,
    find_spans,
    left_out,
    match_pieces,
    render_with_spans,
    thinks,
    trimmings,
)
from yrunner.data.turn_marks import PRIVATE_USE, TurnMarks, read_turn_marks

STAND_IN = chr(PRIVATE_USE[1])


@dataclass(frozen=True)
class Turn:
    """How far the span of an assistant's turn reaches beyond its content, in characters."""

    number: int
    before: int
    after: int


@dataclass(frozen=True)
class Skeleton:
    """What the template writes around the contents of a conversation with these roles."""

    pieces: tuple[str, ...]
    turns: tuple[Turn, ...]

    def spans(self, text: str, chat: Chat) -> list[Span] | None:
        """The spans of the replies in the rendering of a chat; None where it is built otherwise."""
        contents = [message["content"] for message in chat.messages]
        if not all(content.strip() for content in contents):
            return None  # a template may leave out what is empty, and its surroundings
        if any(thinks(contents[turn.number]) for turn in self.turns):
            return None
        places = match_pieces(text, self.pieces, [trimmings(content) for content in contents])
        if places is None:
            return None
        return [
            (places[turn.number][0] - turn.before, places[turn.number][1] + turn.after)
            for turn in self.turns
        ]


class SpanFinder:
    """Renders conversations and finds their spans, and remembers the skeletons of one template.

    Raises `ModelError` where the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.marks = read_turn_marks(tokenizer)
        self._skeletons: dict[tuple[str, ...], Skeleton | FaultyRow | None] = {}

    def render_all(self, chats: Sequence[Chat]) -> list[str | FaultyRow]:
        """The text of every chat, or why the template does not take or show it."""
        plain = [chat for chat in chats if not chat.tools]
        texts = iter(render_all(plain, self._tokenizer))
        found = (self._render_with_tools(chat) if chat.tools else next(texts) for chat in chats)
        return [
            text if isinstance(text, FaultyRow) else closed(text, chat, self.marks)
            for text, chat in zip(found, chats, strict=True)
        ]

    def find(self, text: str, chat: Chat) -> list[Span]:
        """As `find_spans`, mostly without asking the template."""
        if not chat.tools and not chat.has_calls:
            skeleton = self._skeleton(chat.roles)
            spans = skeleton.spans(text, chat) if skeleton else None
            if spans is not None:
                return spans
        return find_spans(text, chat, self._tokenizer, self.marks)

    def _render_with_tools(self, chat: Chat) -> str | FaultyRow:
        if not self.marks.shows_tools:
            return FaultyRow("the chat template does not render tools", "template")
        return render_or_fault(chat, self._tokenizer)

    def _skeleton(self, roles: tuple[str, ...]) -> Skeleton | None:
        if roles not in self._skeletons:
            try:
                skeleton: Skeleton | FaultyRow | None = _learn_skeleton(
                    roles, self._tokenizer, self.marks
                )
            except FaultyRow as fault:
                skeleton = fault
            self._skeletons[roles] = skeleton
        known = self._skeletons[roles]
        if isinstance(known, FaultyRow):
            raise FaultyRow(str(known), known.kind)
        return known


def _learn_skeleton(roles: Sequence[str], tokenizer: Any, marks: TurnMarks) -> Skeleton | None:
    """None where these roles have none. Raises `FaultyRow` where a message would not be shown."""
    stand_ins = [f"{STAND_IN}{number}{STAND_IN}" for number in range(len(roles))]
    chat = Chat(
        [{"role": role, "content": content} for role, content in zip(roles, stand_ins, strict=True)]
    )
    try:
        text, spans = render_with_spans(chat, tokenizer, marks)
    except FaultyRow:
        return None
    for role, stand_in in zip(roles, stand_ins, strict=True):
        if stand_in not in text:
            raise left_out(role)
    pieces, rest = [], text
    for stand_in in stand_ins:
        piece, found, rest = rest.partition(stand_in)
        if not found:
            return None  # shown in another order
        pieces.append(piece)
    pieces.append(rest)
    if STAND_IN in "".join(pieces):
        return None  # shown twice
    places = match_pieces(text, pieces, [[stand_in] for stand_in in stand_ins])
    assert places is not None, "the text consists of its own pieces"
    replies = [number for number, role in enumerate(roles) if role == "assistant"]
    turns = [
        Turn(number, places[number][0] - start, end - places[number][1])
        for number, (start, end) in zip(replies, spans, strict=True)
    ]
    return Skeleton(tuple(pieces), tuple(turns))
