"""`yrun chat` in a pipe and `yrun merge`: what comes after training."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from yrunner.commands.merge import merge
from yrunner.commands.train import train
from yrunner.errors import RunError, YRunnerError
from yrunner.models.load import load_model

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


def test_merge_changes_nothing(trained, capfd):
    merge(TUNED, [])
    said = capfd.readouterr().out
    assert "largest difference of a logit on 8 rows" in said
    folder = trained / "outputs" / "tuned"
    merged = load_model(str(folder / "merged"), dtype=torch.float32)
    adapted = load_model(str(folder / "model"), dtype=torch.float32)
    ids = torch.arange(20)[None] + 100
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits)


def test_a_merge_that_answers_differently_is_refused(trained, monkeypatch):
    """The merged model is loaded from weights that were changed behind our back."""
    from yrunner.commands import merge as command

    def damaged(recipe, run_dir):
        weights = run_dir.model / "adapter_model.safetensors"
        tensors = load_file(weights)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights)
        return tuned_model(recipe, run_dir)

    tuned_model = command.tuned_model
    monkeypatch.setattr(command, "tuned_model", damaged)
    with pytest.raises(RunError, match="merged and adapted logits differ by"):
        merge(TUNED, [])
    assert not (trained / "outputs/tuned/merged").exists()


def test_a_model_without_an_adapter_needs_no_merging(project):
    with pytest.raises(YRunnerError, match=r"full leaves whole weights\. Nothing needs merging"):
        merge(Path("base.yaml"), [])
