"""Questions that are answered as training goes: how many of the answers are right."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from yrunner.evaluation.text_metrics import is_exact, without_thinking


@dataclass(frozen=True)
class Answered:
    """A question with the answer that a model gave."""

    question: str
    reference: str
    answer: str

    @property
    def is_right(self) -> bool:
        """Exactly the reference, but for ways of writing it and for thinking before it."""
        return is_exact(without_thinking(self.answer), without_thinking(self.reference))

    def as_json(self) -> dict[str, Any]:
        """For `before.json` and `after.json`."""
        return {**asdict(self), "right": self.is_right}


def share_right(answered: Sequence[Answered]) -> float:
    """Share of the questions that were answered exactly."""
    return sum(row.is_right for row in answered) / len(answered)
