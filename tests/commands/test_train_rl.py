"""`yrun train` on rewards, from prompts to a model whose answers get more of them."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.commands.conftest import records
from yrunner.commands.train import train


def run(*overrides, resume=False, overwrite=False):
    train(Path("rewarded.yaml"), list(overrides), resume=resume, overwrite=overwrite)


def rollouts(name="rewarded"):
    lines = Path(f"outputs/{name}/rollouts.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def trained(name="rewarded"):
    (file,) = Path(f"outputs/{name}/model").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("tuning", [{}, {"tuning": "{kind: full}", "train.learning_rate": "3e-3"}])
def test_answers_get_more_reward(rewarded, capfd, tuning):
    run(*(f"{key}={value}" for key, value in tuning.items()))
    said = capfd.readouterr().out
    assert "reference" in said and ("adapter off" in said) == (not tuning)
    first, *_, last = [row for row in records("rewarded") if "loss" in row]
    assert first["policy_change"] == 0 and first["kl"] == pytest.approx(0, abs=1e-9)
    assert first["answers"] == 16 and first["truncated"] > 0.5
    assert last["reward_pattern"] > first["reward_pattern"] + 0.2
    validations = [row["eval_reward"] for row in records("rewarded") if "eval_loss" in row]
    assert validations[-1] > validations[0] - 0.1
    lines = rollouts()
    assert len(lines) == 2 * 16 * 4
    assert {line["fate"] for line in lines} <= {"learned", "equal"}
