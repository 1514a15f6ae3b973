"""What is learned from, in two forms: as messages, and as tokens."""

from dataclasses import dataclass
from typing import Literal

from yrunner.errors import Origin
from yrunner.tokens import IGNORE_INDEX

Role = Literal["system", "user", "assistant", "tool", "text"]
"""Who speaks; `text` is a plain document, alone in its conversation."""


class FaultyRow(Exception):
    """A row that cannot be used; the message says why. Whoever read the row adds its place."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """A row as messages with roles."""

    messages: tuple[Message, ...]
    origin: Origin

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
