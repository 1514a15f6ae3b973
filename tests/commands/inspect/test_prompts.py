"""`yrun inspect` shows prompts for rewards, and why one is left out."""

import re
from pathlib import Path

from tests.conftest import questions, write_jsonl
from yrunner.commands.inspect.command import inspect

REWARDED = Path("rewarded.yaml")
EXACT = "rewards=[{kind: exact}]"


def test_each_prompt_is_shown_once_with_what_rewards_read(rewarded, capfd):
    inspect(REWARDED, [EXACT, "train.order=as_written"], number=3, row=None)
    shown = capfd.readouterr().out
    assert [int(row) for row in re.findall(r"^── prompts\.jsonl row (\d+)", shown, re.M)] == [
        1,
        2,
        3,
    ]
    for question, answer in questions(3):
        assert question in shown.replace("\n", " ") or question.split()[-1] in shown
        assert f'for the rewards:\nanswer: "{answer}"' in shown
    inspect(REWARDED, [], number=1, row=None)
    assert "for the rewards:\nno column" in capfd.readouterr().out


def test_a_prompt_that_is_left_out_has_its_reason(rewarded, capfd):
    write_jsonl(rewarded / "prompts.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": "Who?"}])
    inspect(REWARDED, [EXACT], number=1, row="prompts.jsonl:2")
    shown = capfd.readouterr().out
    assert '"answer" is missing, which the reward "exact" needs' in shown
    inspect(REWARDED, [EXACT], number=1, row="prompts.jsonl:1")
    assert 'answer: "b"' in capfd.readouterr().out
