"""Conversations, as messages and as tokens with labels."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from yrunner.errors import Origin
from yrunner.tokens import IGNORE_INDEX

Role = Literal["system", "user", "assistant", "tool", "text"]
"""`text` is a plain document, the only message of its conversation."""

FaultKind = Literal[
    "unreadable",
    "not_an_object",
    "missing_field",
    "wrong_type",
    "empty",
    "roles",
    "characters",
    "template",
    "no_targets",
    "too_long",
    "altered",
    "thinking",
    "equal_answers",
    "different_prompts",
]
"""Why a row is refused; rows are counted by it."""

Note = Literal[
    "altered",
    "thinking",
    "spelled_plain",
    "spelled_kept",
    "end_by_hand",
    "one_end",
    "one_cut",
]
"""Something about a tokenized row that deserves a look; quality.py says what."""


class FaultyRow(Exception):
    """A row that cannot be used; the message says why. The reader of the row adds its origin."""

    def __init__(self, reason: str, kind: FaultKind) -> None:
        super().__init__(reason)
        self.kind: FaultKind = kind


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    """Empty in a reply that only calls tools."""
    learned: bool = True
    """False for a reply that is context only (`train: false`, `weight: 0`)."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """In OpenAI's form, for the chat template."""
    extras: Mapping[str, str] | None = None
    """`name` and `tool_call_id` of a tool's result, for the chat template."""


@dataclass(frozen=True)
class Conversation:
    """A row as messages with roles."""

    messages: tuple[Message, ...]
    origin: Origin
    tools: tuple[Mapping[str, Any], ...] = ()
    """Tools in OpenAI's form, for the chat template."""
    is_desirable: bool | None = None
    """Whether its answer is the better one of a pair, or marked as good; None without a mark."""
    columns: Mapping[str, Any] | None = None
    """Of a prompt without an answer: every column of its row, for rewards."""

    @property
    def is_text(self) -> bool:
        """True for a plain document, which has no turns."""
        return self.messages[0].role == "text"


Answers = tuple[Conversation, ...]
"""What a row teaches: the better and the worse answer, or one conversation."""


@dataclass(frozen=True)
class TokenizedExample:
    """A conversation as token ids.

    `labels` is as long as `input_ids` and *not* shifted: a target's label is its token id, every
    other label is IGNORE_INDEX. So is the first, since no token precedes it to predict it: the
    labels other than IGNORE_INDEX are exactly the targets.
    """

    input_ids: list[int]
    labels: list[int]
    origin: Origin

    def __post_init__(self) -> None:
        assert len(self.input_ids) == len(self.labels), "every token needs a label"
        assert not self.labels or self.labels[0] == IGNORE_INDEX, "nothing predicts the first token"

    @property
    def target_positions(self) -> list[int]:
        """Positions of the targets, in order."""
        return [position for position, label in enumerate(self.labels) if label != IGNORE_INDEX]


@dataclass(frozen=True)
class TokenizedPair:
    """A better and a worse answer to one prompt, as tokens."""

    chosen: TokenizedExample
    rejected: TokenizedExample


@dataclass(frozen=True)
class RatedExample:
    """An answer that is marked good or bad, for KTO."""

    example: TokenizedExample
    is_desirable: bool


@dataclass(frozen=True)
class TokenizedParts:
    """A conversation as token ids, split into context and targets: a compact `TokenizedExample`.

    Parts alternate, context first; any may be empty. The first token is never a target, even in a
    part of targets.
    """

    parts: list[list[int]]
    origin: Origin
    notes: frozenset[Note] = frozenset()
    altered: FaultyRow | None = None
    """Why the recipe's `data.altered` decides whether the row is used."""

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def has_targets(self) -> bool:
        """Whether any token is a target."""
        first = next((number for number, part in enumerate(self.parts) if part), 0)
        return sum(map(len, self.parts[1::2])) > first % 2

    def cut(self, start: int, end: int) -> "TokenizedParts":
        """Tokens `start` to `end`, exclusive."""
        parts, position = [], 0
        for part in self.parts:
            parts.append(part[max(0, start - position) : max(0, end - position)])
            position += len(part)
        return replace(self, parts=parts)

    def example(self) -> TokenizedExample:
        """The same example with a label for every token."""
        input_ids: list[int] = []
        labels: list[int] = []
        for number, part in enumerate(self.parts):
            input_ids += part
            labels += part if number % 2 else [IGNORE_INDEX] * len(part)
        labels[:1] = [IGNORE_INDEX] * len(labels[:1])
        return TokenizedExample(input_ids, labels, self.origin)
