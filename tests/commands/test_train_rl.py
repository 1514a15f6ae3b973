"""`yrun train` on rewards, from prompts to a model whose answers get more of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands.conftest import BRIEF, records
from yrunner.commands.check.command import check
from yrunner.commands.train import train
from yrunner.errors import DataError, RunError, YRunnerError

YRUN = [sys.executable, "-m", "yrunner.cli", "train"]


def run(*overrides, resume=False, overwrite=False):
    train(Path("rewarded.yaml"), list(overrides), resume=resume, overwrite=overwrite)


def rollouts(name="rewarded"):
    lines = Path(f"outputs/{name}/rollouts.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def trained(name="rewarded"):
    (file,) = Path(f"outputs/{name}/model").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(
    "tuning", ["{kind: full}", "{kind: lora, rank: 4, alpha: 8, dropout: 0.0}"]
)
def test_a_run_on_rewards_ends_with_a_model_and_its_rollouts(rewarded, capfd, tuning):
    run(f"tuning={tuning}", "train.learning_rate=3e-3")
    said = capfd.readouterr().out
    assert "reference" in said and ("adapter off" in said) == ("lora" in tuning)
    assert "reward 0." in said and "highest validation reward" in said
    assert "Answers drawn: the first 16, and the last 16" in said
    rows = [row for row in records("rewarded") if "loss" in row]
    assert len(rows) == 8
    assert rows[0]["policy_change"] == 0 and abs(rows[0]["kl"]) < 1e-9 < rows[-1]["kl"]
    assert all(row["answers"] == 16 and row["clipped"] == 0 for row in rows)
    for row in rows:
        expected = row["reward_pattern"] + 0.1 * row["reward_repetition"]
        assert row["reward"] == pytest.approx(expected)
    lines = rollouts()
    assert len(lines) == 2 * 16 * 4 and {line["row"] for line in lines} == set(range(1, 17))
    assert {line["fate"] for line in lines} <= {"learned", "equal"}
    for line in lines:
        found = 1.0 if "is" in line["text"] else 0.0
        assert line["rewards"]["pattern"] == found
    page = Path("outputs/rewarded/report.html").read_text("utf-8")
    assert "validation reward" in page and "Weight by loss" not in page
    assert "Answers drawn" in page and "sum, less penalties" in page


def test_what_is_rewarded_is_learned(rewarded):
    """Words are: a policy gradient with the sign or the order of groups wrong would lose them."""
    run(
        "tuning={kind: full}",
        "rewards=[{kind: pattern, pattern: '[A-Za-z]{4}'}]",
        "loss={kind: grpo, preset: dr_grpo}",
        "train.epochs=3",
        "data.validation=[]",
        "eval.budget=0.01",
    )
    rows = [row["reward"] for row in records("rewarded") if "loss" in row]
    assert rows[0] < 0.7 < 0.9 < sum(rows[-3:]) / 3


@pytest.mark.parametrize(
    "addition",
    [
        "loss={kind: rloo}",
        "loss={kind: grpo, preset: gspo}",
        "rollout={generations: 2, max_new_tokens: 5, updates_per_rollout: 2, truncated: penalise}",
        "rollout={generations: 4, max_new_tokens: 5, temperature: 0.7, truncated: keep}",
        "model.dtype=bfloat16",
        "train.gradient_checkpointing=true",
        "train.order=as_written",
        "data.validation=[]",
        "tuning={kind: qlora, rank: 4, alpha: 8}",
        "keep={kind: self_replay, rows: 4, share: 0.25}",
        "rollout={generations: 2, max_new_tokens: 5, truncated: keep, resample: 2}",
    ],
)
def test_what_other_stages_have_works_here_too(rewarded, addition):
    run(addition, "train.max_steps=3")
    rows = [row for row in records("rewarded") if "loss" in row]
    assert len(rows) == 3 and rows[0]["policy_change"] == 0


def test_an_update_holds_whole_groups(rewarded):
    for command in (train, check):
        more = {} if command is train else {"as_machine": True}
        with pytest.raises(RunError) as caught:
            command(
                Path("rewarded.yaml"),
                ["train.gradient_accumulation_steps=3", "rollout.generations=8"],
                **more,
            )
        assert "an update has 12 answers (3 micro-batches of train.batch_size 4)" in str(
            caught.value.message
        )
        assert "to 4, for example" in caught.value.remedy


def test_prompts_that_leave_no_room_for_an_answer_are_refused(rewarded):
    with pytest.raises(YRunnerError, match="has 25 tokens and its answer up to 120"):
        run("rollout.max_new_tokens=120")
    with pytest.raises(DataError, match="256 positions"):
        run("rollout.max_new_tokens=250", "data.max_length=1000")


@pytest.mark.parametrize(
    "sharing",
    [["distributed.processes=2"], ["distributed={processes: 2, deepspeed: {stage: 3}}"]],
    ids=["ddp", "zero3"],
)
def test_two_ranks_end_where_one_does(rewarded, sharing, forks):
    """Under ZeRO 3 in all weights, with the base as reference beside them."""
    more = ["rollout.updates_per_rollout=2", "data.validation=[]", BRIEF]
    if "stage: 3" in sharing[0]:
        more += ["tuning={kind: full}", "train.learning_rate=1e-3", "train.max_steps=3"]
    two = [*YRUN, "rewarded.yaml", "name=two", "train.gradient_accumulation_steps=2"]
    run("name=one", *more)
    subprocess.run([*two, *sharing, *more], check=True, capture_output=True)
    assert rollouts("one") == rollouts("two")
    one, other = trained("one"), trained("two")
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-4, atol=1e-5)
