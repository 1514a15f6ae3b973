"""`yrun train` with `loss.kind: ppo`: policy, critic and reward model as adapters on one base."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands.conftest import BRIEF, PREFERRED, REWARDED, records
from tests.project import write_recipe
from yrunner.assembly.run import Run
from yrunner.assembly.trainer import load_rewards, untrained_model
from yrunner.commands.check.command import check
from yrunner.commands.merge.command import merge
from yrunner.commands.train import train
from yrunner.errors import ModelError, RecipeError, RunError
from yrunner.recipe.load import load_recipe
from yrunner.rewards.completion import Completion
from yrunner.scoring.reward_model import AdapterScores

LORA = {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.0}
PPO = REWARDED | {
    "name": "ppo",
    "tuning": LORA,
    "loss": {"kind": "ppo"},
    "train": REWARDED["train"] | {"learning_rate": 3.0e-3},
}
REWARD = PREFERRED | {
    "name": "reward",
    "tuning": LORA,
    "loss": {"kind": "bradley_terry"},
    "train": PREFERRED["train"] | {"stage": "reward", "max_steps": 4},
}
JUDGED = ["rewards=[{kind: reward_model, model: reward.yaml}]", "loss.critic=reward.yaml"]


@pytest.fixture
def acting(preferred, rewarded):
    """A folder with a trained base, prompts, pairs, and recipes of PPO and of a reward model."""
    write_recipe(rewarded / "ppo.yaml", PPO)
    write_recipe(rewarded / "reward.yaml", REWARD)
    return rewarded


def run(*overrides, resume=False, overwrite=False):
    train(Path("ppo.yaml"), list(overrides), resume=resume, overwrite=overwrite)


def lines(name="ppo"):
    path = Path(f"outputs/{name}/rollouts.jsonl")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def trained(name="ppo", part="model"):
    (file,) = Path(f"outputs/{name}/{part}").glob("*.safetensors")
    return load_file(file)


def test_a_run_saves_its_policy_and_the_critic_beside_it(acting, capfd):
    run()
    said = capfd.readouterr().out
    assert "critic" in said and "a second adapter on the same base" in said
    assert "value loss" in said and "equal groups" not in said
    rows = [row for row in records("ppo") if "loss" in row]
    assert rows[0]["policy_change"] == 0 and rows[0]["value"] == 0
    for row in rows:
        assert row["loss"] == pytest.approx(row["policy_loss"] + 0.1 * row["value_loss"], abs=1e-6)
    assert all("value" in line and line["fate"] == "learned" for line in lines())
    assert not any("critic" in name for name in trained())
    assert any("lora_B" in name for name in trained(part="critic"))
    page = Path("outputs/ppo/report.html").read_text("utf-8")
    assert "explained variance" in page
    merge(Path("ppo.yaml"), [])
    assert not any("critic" in name for name in trained(part="merged"))
    # Another run goes on from this one's critic, and from no other base.
    later = PPO | {"name": "later", "loss": {"kind": "ppo", "critic": "ppo.yaml"}}
    write_recipe(acting / "later.yaml", later)
    train(Path("later.yaml"), ["train.max_steps=1"])
    (first,) = [row for row in records("later") if "loss" in row]
    assert first["value"] != 0
    with pytest.raises(ModelError, match="was trained on another base"):
        run("name=other", "loss.critic=outputs/ppo/critic", "model.base=outputs/ppo/merged")


@pytest.mark.parametrize(
    "addition",
    [
        "tuning={kind: full}",
        "tuning={kind: freeze, train_top: 0.5}",
        "tuning={kind: lora, rank: 4, variant: dora, dropout: 0.0}",
        "tuning={kind: lora, rank: 4, train_tokens: ['<|im_end|>'], dropout: 0.1}",
        "tuning={kind: lora, rank: 4, targets: [q_proj, lm_head]}",
        "tuning={kind: qlora, rank: 4, alpha: 8}",
        "model.dtype=bfloat16",
        "train.gradient_checkpointing=true",
        "rollout={generations: 1, max_new_tokens: 5, updates_per_rollout: 2, truncated: penalise}",
        "loss={kind: ppo, beta: 0.0, whiten: false, lam: 1.0, gamma: 0.9}",
        "keep={kind: self_replay, rows: 4, share: 0.25}",
        "keep={kind: ewc, rows: 4}",
    ],
)
def test_what_other_losses_have_works_here_too(acting, addition):
    run(addition, "train.max_steps=2", "data.validation=[]", "eval.budget=0.01")
    rows = [row for row in records("ppo") if "loss" in row]
    assert len(rows) == 2 and rows[0]["policy_change"] == 0
    assert rows[1]["value_loss"] > 0
    assert not any("critic" in name for name in trained())


def test_the_critic_learns_at_its_own_rate(acting):
    settings = ["train.max_steps=2", "data.validation=[]", "eval.budget=0.01"]
    own = "loss={kind: ppo, critic_learning_rate: 3.0e-9}"
    run(own, *settings)
    moved, (first, last) = trained(part="critic"), [row for row in records("ppo") if "loss" in row]
    assert all(weight.abs().max() < 1e-7 for name, weight in moved.items() if "lora_B" in name)
    assert abs(last["value"]) < 1e-6
    assert first["learning_rate"] == last["learning_rate"] == 3.0e-3
    assert any(weight.abs().max() > 1e-3 for name, weight in trained().items() if "lora_B" in name)


def test_a_reward_model_is_trained_first_and_is_an_adapter_on_the_same_base(acting, capfd):
    run(*JUDGED, "train.max_steps=3")
    said = capfd.readouterr().out
    assert "the reward model reward has not been trained yet: training it first" in said
    assert "reward reward_model: an adapter on the base in memory, no second model" in said
    assert Path("outputs/reward/model/adapter/origin.json").exists()
    rows = [row for row in records("ppo") if "loss" in row]
    assert rows[0]["value"] != 0, "the critic knows what the reward model knows"
    # The same scores as the whole classifier gives.
    own = Run.load(Path("ppo.yaml"), JUDGED)
    model = untrained_model(own)
    (adapter,), (whole,) = load_rewards(own, model), own.load_rewards()
    assert isinstance(adapter.model.classifier, AdapterScores)
    completions = [
        Completion(prompt.messages, text, prompt.columns, prompt.origin, 3, False)
        for prompt in list(own.prompts.train)[:4]
        for text in ("Paris is it", "no")
    ]
    assert adapter.score(completions) == pytest.approx(whole.score(completions), abs=1e-5)
    assert len(set(whole.score(completions))) > 4
    # A reward model that has changed is trained again.
    text = Path("reward.yaml").read_text().replace("max_steps: 4", "max_steps: 5")
    Path("reward.yaml").write_text(text)
    run(*JUDGED, "train.max_steps=1", overwrite=True)
    assert "reward model reward has changed (recipe.train.max_steps)" in capfd.readouterr().out


def test_check_says_what_is_held_in_memory_and_waits_for_the_reward_model(acting, capsys):
    check(Path("ppo.yaml"), [], as_machine=True, sample=1)
    lora = json.loads(capsys.readouterr().out)
    assert "second adapter on the same base" in lora["critic"]
    check(Path("ppo.yaml"), ["tuning={kind: full}"], as_machine=True, sample=1)
    full = json.loads(capsys.readouterr().out)
    assert "own hidden states" in full["critic"] and "copy of the model" in full["reference"]
    check(Path("ppo.yaml"), ["loss={kind: rloo}"], as_machine=True, sample=0)
    alone = json.loads(capsys.readouterr().out)

    def own(facts):
        return next(line for line in facts["memory"]["lines"] if line["is_own"])

    assert alone["critic"] is None
    assert own(lora)["optimizer"] > 1.9 * own(alone)["optimizer"]
    assert own(lora)["activations"] > 1.3 * own(alone)["activations"]
    check(Path("ppo.yaml"), JUDGED, as_machine=True, sample=1)
    waiting = json.loads(capsys.readouterr().out)
    assert "the reward model reward is not trained" in waiting["rollouts"]["skipped"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["tuning={kind: full}", "loss.critic=reward.yaml"], "loss.critic and tuning.kind full"),
        (["loss={kind: grpo}", "rollout.generations=1"], "leaves nothing to compare"),
        (["rollout.resample=2"], "loss.kind ppo and rollout.resample cannot be combined"),
        (["loss.critic=ppo.yaml"], "the recipes form a cycle"),
        (["rewards=[{kind: reward_model, model: ppo.yaml}]"], "the recipes form a cycle"),
    ],
)
def test_what_cannot_be_combined_is_said_before_anything_loads(acting, overrides, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("ppo.yaml"), overrides)
    assert words in str(caught.value) and "; " in str(caught.value)


def test_a_critic_that_is_no_adapter_is_refused_in_one_sentence(acting):
    with pytest.raises(RunError, match=r"has train\.stage pretrain, which makes no reward model"):
        run("loss.critic=base.yaml")
    write_recipe(acting / "whole.yaml", REWARD | {"name": "whole", "tuning": {"kind": "full"}})
    with pytest.raises(RunError, match=r"has tuning.kind full, whose result is no adapter"):
        run("loss.critic=whole.yaml")
    with pytest.raises(ModelError, match="holds no adapter with a score"):
        run("loss.critic=outputs/base/model")


@pytest.mark.parametrize(
    "more",
    [
        ["distributed.processes=2", BRIEF],
        ["distributed={processes: 2, deepspeed: {stage: 2}}", "keep={kind: ewc, rows: 4}", BRIEF],
        ["distributed={processes: 2, deepspeed: {stage: 3}}", *JUDGED, BRIEF],
        ["distributed={processes: 2, deepspeed: {stage: 3}}", "tuning={kind: full}"],
    ],
    ids=["ddp", "zero2", "zero3-adapters", "zero3-full"],
)
def test_two_ranks_end_where_one_does(acting, forks, more):
    """Under ZeRO 3 also with a critic and a reward that are adapters on the sharded base."""
    sharing, *others = more
    rate = "train.learning_rate=1.0e-3"
    # The second cycle of answers is drawn from weights that have moved twice.
    others += ["rollout.updates_per_rollout=2", "data.validation=[]", "train.max_steps=3", rate]
    two = [sys.executable, "-m", "yrunner.cli", "train", "ppo.yaml", "name=two", *others]
    run("name=one", *others)
    two += ["train.gradient_accumulation_steps=2", sharing]
    subprocess.run(two, check=True, capture_output=True)
    one, other = lines("one"), lines("two")
    assert [line["text"] for line in one] == [line["text"] for line in other]
    parts = ["model"] if "tuning={kind: full}" in more else ["model", "critic"]
    for part in parts:
        known, found = trained("one", part), trained("two", part)
        assert known.keys() == found.keys()
        for name, weight in known.items():
            torch.testing.assert_close(weight, found[name], rtol=1e-4, atol=1e-5)


def test_a_run_under_deepspeed_goes_on_as_if_nothing_had_been(acting, forks):
    """The critic too: its weights and their moments are part of the checkpoint."""
    settings = ["rollout.updates_per_rollout=2", "data.validation=[]", "train.checkpoint.every=1"]
    settings += ["distributed.deepspeed={stage: 3}", "train.checkpoint.keep=9"]
    settings += ["train.max_steps=3", "name=parts", BRIEF]
    run(*settings)
    whole = {part: trained("parts", part) for part in ("model", "critic")}
    for step in (2, 3):
        shutil.rmtree(f"outputs/parts/checkpoints/step-{step}")
    for part in whole:
        shutil.rmtree(f"outputs/parts/{part}")
    run(*settings, resume=True)
    for part, known in whole.items():
        found = trained("parts", part)
        for name, weight in known.items():
            torch.testing.assert_close(weight, found[name], rtol=1e-6, atol=1e-7)


def test_a_killed_run_goes_on_in_the_midst_of_a_cycle_as_if_nothing_had_been(acting, forks):
    settings = ["rollout.updates_per_rollout=3", "train.checkpoint={every: 1, keep: 9}"]
    settings += ["train.max_steps=5", "data.validation=[]"]
    run("name=undisturbed", *settings)
    command = [sys.executable, "-m", "yrunner.cli", "train", "ppo.yaml", "name=killed", *settings]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not Path("outputs/killed/checkpoints/step-2").exists():
        time.sleep(0.02)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run("name=killed", *settings, resume=True)
    for part in ("model", "critic"):
        known, found = trained("undisturbed", part), trained("killed", part)
        assert all(torch.equal(weight, found[name]) for name, weight in known.items())
    assert lines("undisturbed") == lines("killed")
