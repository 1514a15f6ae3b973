"""An answer that the model wrote, what a reward says of it, and the sum of all rewards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from yrunner.data.conversation import Message
from yrunner.errors import Origin


@dataclass(frozen=True)
class Completion:
    """An answer to a prompt."""

    prompt: tuple[Message, ...]
    text: str
    """Without the end mark and other special tokens. If the prompt opens a thinking block, it
    begins with that mark, so that thinking without an end is seen as such."""
    columns: Mapping[str, Any]
    """Every column of the prompt's row, and `answer` if the row ends with a reply."""
    origin: Origin
    """The row of the prompt."""
    num_tokens: int
    is_truncated: bool
    """Whether it ended at `rollout.max_new_tokens` instead of an end mark."""


class Reward(Protocol):
    """Scores answers."""

    name: str
    weight: float

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        """A finite number for each answer; None where the reward has no opinion.

        Raises `YRunnerError` if the reward cannot judge an answer.
        """


def total_rewards(
    parts: Sequence[Sequence[float | None]], weights: Sequence[float]
) -> list[float | None]:
    """The weighted sum of each answer's rewards; `parts` has a list for each reward.

    A None adds nothing; the sum is None where no reward with a weight has an opinion.
    """
    return [
        _weighted_sum([(one, weight) for one, weight in zip(scores, weights, strict=True)])
        for scores in zip(*parts, strict=True)
    ]


def _weighted_sum(scores: Sequence[tuple[float | None, float]]) -> float | None:
    found = [score * weight for score, weight in scores if score is not None and weight]
    return sum(found) if found else None
