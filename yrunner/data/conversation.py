"""What is learned from, in two forms: as messages, and as tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from yrunner.errors import Origin
from yrunner.tokens import IGNORE_INDEX

Role = Literal["system", "user", "assistant", "tool", "text"]
"""Who speaks; `text` is a plain document, alone in its conversation."""


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
]
"""Why a row is refused, in one word, for the counts."""


class FaultyRow(Exception):
    """A row that cannot be used; the message says why. Whoever read the row adds its place."""

    def __init__(self, reason: str, kind: FaultKind) -> None:
        super().__init__(reason)
        self.kind: FaultKind = kind


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    """What is said; empty in an assistant's turn that only calls tools."""
    learned: bool = True
    """False for an assistant's turn that is context only (`train: false`, `weight: 0`)."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Calls in OpenAI's form, as chat templates read them."""
    extras: Mapping[str, str] | None = None
    """`name` and `tool_call_id`, where a row has them, for the template."""


@dataclass(frozen=True)
class Conversation:
    """A row as messages with roles."""

    messages: tuple[Message, ...]
    origin: Origin
    tools: tuple[Mapping[str, Any], ...] = ()
    """Descriptions of the tools, as chat templates read them."""

    @property
    def is_text(self) -> bool:
        """True for a plain document, which has no turns."""
        return self.messages[0].role == "text"


@dataclass(frozen=True)
class TokenizedExample:
    """A conversation as token ids.

    `labels` is as long as `input_ids` and *not* shifted: a label is the token's own id where its
    loss counts and IGNORE_INDEX elsewhere. The first label is always IGNORE_INDEX, because nothing
    stands before it that could predict it; so the number of labels is the number of targets.
    """

    input_ids: list[int]
    labels: list[int]
    origin: Origin

    def __post_init__(self) -> None:
        assert len(self.input_ids) == len(self.labels), "every token needs a label"
        assert not self.labels or self.labels[0] == IGNORE_INDEX, "nothing predicts the first token"

    @property
    def target_positions(self) -> list[int]:
        """Places of the targets, in order."""
        return [place for place, label in enumerate(self.labels) if label != IGNORE_INDEX]


@dataclass(frozen=True)
class TokenizedParts:
    """A conversation as token ids, cut where learning begins and ends.

    Its parts are context and targets by turns, context first; any may be empty. Of the first token
    of all, nothing is learned, wherever it stands. The short form of a `TokenizedExample`.
    """

    parts: list[list[int]]
    origin: Origin

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def has_targets(self) -> bool:
        """Whether there is something to learn."""
        first = next((number for number, part in enumerate(self.parts) if part), 0)
        return sum(map(len, self.parts[1::2])) > first % 2

    def cut(self, start: int, end: int) -> "TokenizedParts":
        """The tokens from number `start` to before `end`."""
        parts, place = [], 0
        for part in self.parts:
            parts.append(part[max(0, start - place) : max(0, end - place)])
            place += len(part)
        return TokenizedParts(parts, self.origin)

    def example(self) -> TokenizedExample:
        """The same with a label for every token."""
        input_ids: list[int] = []
        labels: list[int] = []
        for number, part in enumerate(self.parts):
            input_ids += part
            labels += part if number % 2 else [IGNORE_INDEX] * len(part)
        labels[:1] = [IGNORE_INDEX] * len(labels[:1])
        return TokenizedExample(input_ids, labels, self.origin)
