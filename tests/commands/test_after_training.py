"""`yrun chat` in a pipe: what comes after training."""

import subprocess
import sys
from pathlib import Path

import pytest

from yrunner.commands.train import train

TUNED = Path("tuned.yaml")


@pytest.fixture
def trained(project, capfd):
    train(TUNED, [], resume=False, overwrite=False)
    capfd.readouterr()
    return project


def test_chat_answers_the_lines_of_a_pipe(trained):
    command = [sys.executable, "-m", "yrunner.cli", "chat", "tuned.yaml", "--max-new-tokens", "5"]
    lines = "Capital of Aru, question 0?\n\n/reset\nCapital of Isk, question 4?\n"
    result = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    assert len(result.stdout.splitlines()) >= 2
    assert result.stderr == ""
