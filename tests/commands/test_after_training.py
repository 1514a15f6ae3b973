"""`yrun chat` in a pipe: what comes after training."""

import io
from pathlib import Path

from yrunner.cli import app
from yrunner.commands.train import train


def test_chat_answers_the_lines_of_a_pipe(trained_base, monkeypatch, capfd):
    train(Path("tuned.yaml"), ["eval.tasks=[]"], resume=False, overwrite=False)
    lines = "Capital of Aru, question 0?\n\n/reset\nCapital of Isk, question 4?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    capfd.readouterr()
    app(["chat", "tuned.yaml", "eval.tasks=[]", "--max-new-tokens", "5"], standalone_mode=False)
    said, errors = capfd.readouterr()
    assert len(said.splitlines()) >= 2
    assert errors == ""
