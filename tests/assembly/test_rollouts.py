"""What a reward is shown of an answer."""

from pathlib import Path
from typing import Any

import pytest

from yrunner.assembly.rl.rollouts import score_answers
from yrunner.data.conversation import Message
from yrunner.data.dataset.prompts import PromptRow
from yrunner.errors import Origin
from yrunner.recipe.schema.rewards import ExactReward, LengthReward, XmlReward
from yrunner.rewards.make import make_rewards
from yrunner.training.rl.collect import WrittenAnswer

OPENS = "<think>\n"


@pytest.mark.parametrize(
    ("opening", "text", "exact", "short", "form"),
    [
        ("", "42", 1, 1, 0),
        (OPENS, "42", 0, 0, 0),  # still thinking: no answer
        (OPENS, "six by seven is 42, or is it", 0, 0, 0),
        (OPENS, "six by seven</think>42", 1, 1, 0),
        (OPENS, "six by seven</think><b>42</b>", 0, 1, 1),
        ("", "six by seven</think><b>42</b>", 0, 1, 0),
        ("<think>\n\n</think>\n\n", "42", 1, 1, 0),
    ],
)
def test_rewards_know_whether_the_prompt_opens_the_thinking(
    opening: str, text: str, exact: int, short: int, form: int, capitals_tokenizer: Any
):
    plain = capitals_tokenizer.chat_template
    shown = "{% if add_generation_prompt %}" + opening + "{% endif %}"
    capitals_tokenizer.chat_template = plain + shown
    sections = [
        ExactReward(kind="exact", column="answer"),
        LengthReward(kind="length", maximum=12, unit="characters"),
        XmlReward(kind="xml", tags=["think", "b"], grade="whole"),
    ]
    row = PromptRow([1], (Message("user", "6 * 7?"),), {"answer": "42"}, Origin(Path("a"), 1))
    answer = WrittenAnswer([1], text, 1, is_truncated=False)
    try:
        rewards = make_rewards(sections, trust_code=False)
        found, _ = score_answers(capitals_tokenizer, rewards, [row], [answer])
    finally:
        capitals_tokenizer.chat_template = plain
    assert found == [[exact, short, form]]
