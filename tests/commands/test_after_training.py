"""`yrun eval` and `yrun chat`: what comes after training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from yrunner.commands.eval import evaluate
from yrunner.commands.train import train
from yrunner.errors import RunError, YRunnerError

TUNED = Path("tuned.yaml")


@pytest.fixture
def trained(project, capfd):
    train(TUNED, [], resume=False, overwrite=False)
    capfd.readouterr()
    return project


def test_eval_answers_every_task_with_the_base_and_the_result(trained, capfd):
    evaluate(TUNED, [])
    assert "capitals" in capfd.readouterr().out
    answers = json.loads((trained / "outputs/tuned/eval.json").read_text())["answers"]
    after = json.loads((trained / "outputs/tuned/after.json").read_text())["answers"]
    assert answers == after, "a merged adapter answers as the trained model did"


def test_eval_without_tasks_or_without_a_result_says_what_to_do(project):
    with pytest.raises(YRunnerError, match=r"has no eval\.tasks\. Add one"):
        evaluate(TUNED, ["eval.tasks=[]"])
    with pytest.raises(RunError, match=r"has no result in .*\. Train it first: yrun train"):
        evaluate(TUNED, [])


def test_chat_answers_the_lines_of_a_pipe(trained):
    command = [sys.executable, "-m", "yrunner.cli", "chat", "tuned.yaml", "--max-new-tokens", "5"]
    lines = "Capital of Aru, question 0?\n\n/reset\nCapital of Isk, question 4?\n"
    result = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    assert len(result.stdout.splitlines()) >= 2
    assert result.stderr == ""
