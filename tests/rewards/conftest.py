"""Answers to score, and recipe sections by their keys."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from yrunner.data.conversation import Message
from yrunner.errors import Origin
from yrunner.recipe.schema.rewards import RewardSection
from yrunner.rewards.completion import Completion
from yrunner.rewards.make import make_rewards


def answer(text: str, row: int = 1, *, num_tokens: int = 7, **columns: Any) -> Completion:
    prompt = (Message("user", "How much?"),)
    return Completion(prompt, text, columns, Origin(Path("sums.jsonl"), row), num_tokens, False)


def section(**keys: Any) -> Any:
    return TypeAdapter(RewardSection).validate_python(keys)


@pytest.fixture
def score() -> Callable[..., list[float | None]]:
    """The scores of answers, texts or completions, by the reward with these keys."""

    def score(*answers: Any, columns: dict[str, Any] | None = None, **keys: Any) -> Any:
        (reward,) = make_rewards([section(**keys)], trust_code=True)
        completions = [
            answer(each, **columns or {}) if isinstance(each, str) else each for each in answers
        ]
        found = reward.score(completions)
        return found[0] if len(found) == 1 else found

    return score
