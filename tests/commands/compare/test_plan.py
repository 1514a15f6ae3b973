"""What arms will do is known before they run, and where they differ unasked is said."""

import json

import pytest

from tests.conftest import write_jsonl
from yrunner.assembly.run import Run
from yrunner.commands.compare.plan import environment_notes, fairness_notes, plan_facts
from yrunner.storage.run_dir import RunDir, write_json


@pytest.fixture
def facts(project):
    """Plan tuned.yaml with these overrides; its base has not been trained, only its tokenizer."""

    def plan(*overrides):
        return plan_facts(Run.load(project / "tuned.yaml", overrides))

    return plan


def test_a_plan_tells_updates_targets_and_rows_as_counted_by_hand(facts, project):
    targets = Run.load(project / "tuned.yaml").dataset.train.num_targets
    plan = facts()
    assert (plan.updates, plan.rows) == (2 * 16 // 4, 16)
    assert plan.targets == 2 * int(targets.sum())


@pytest.mark.parametrize("token_batch", [1, 7])
def test_token_batches_see_the_same_targets_in_more_updates(facts, token_batch):
    whole, cut = facts(), facts(f"train.token_batch={token_batch}")
    assert cut.targets == whole.targets
    assert cut.updates > whole.updates


def test_the_last_update_of_max_steps_ends_the_count_of_targets(facts, project):
    run = Run.load(project / "tuned.yaml", ["train.order=as_written"])
    targets = run.dataset.train.num_targets
    plan = facts("train.order=as_written", "train.epochs=1", "train.max_steps=3")
    assert (plan.updates, plan.targets) == (3, int(targets[:12].sum()))


def test_arms_that_differ_in_their_loss_alone_give_no_note(facts):
    assert fairness_notes({"nlirg": facts(), "plain": facts("loss={kind: plain}")}) == []


def test_every_unasked_difference_is_said_with_both_figures(facts):
    arms = {
        "first": facts(),
        "wide": facts("train.batch_size=8"),
        "long": facts("train.epochs=3"),
        "few": facts("data.train.0.take=8", "train.epochs=4"),
        "in order": facts("train.order=as_written"),
    }
    targets = arms["first"].targets
    wide, long, few, in_order = fairness_notes(arms)
    assert wide == "compared with first, wide has 4 updates instead of 8"
    assert f"12 updates instead of 8; {targets // 2 * 3:,} targets seen instead of {targets:,}" in (
        long
    )
    assert "8 different rows instead of 16" in few
    assert in_order == "compared with first, in order has another row order"


def test_another_base_is_said(facts, project):
    (project / "other.yaml").write_text((project / "base.yaml").read_text().replace("base", "two"))
    (note,) = fairness_notes({"first": facts(), "other": facts("model.base=other.yaml")})
    assert note == "compared with first, other has another base"


def test_runs_of_different_machines_or_versions_are_said(tmp_path):
    runs = {}
    for name, device in (("a", "CPU, 2 threads"), ("b", "CPU, 1 threads"), ("c", "CPU, 2 threads")):
        runs[name] = RunDir(tmp_path / name)
        runs[name].folder.mkdir()
        environment = {"versions": {"torch": "2"}, "commit": None, "device": device}
        write_json(runs[name].environment, environment)
    (note,) = environment_notes(runs)
    assert "different device: CPU, 2 threads: a, c; CPU, 1 threads: b" in note
    assert environment_notes({"a": runs["a"], "c": runs["c"]}) == []


def test_answers_are_counted_where_the_model_writes_them(project):
    rows = [{"prompt": f"Say {number}", "answer": "yes"} for number in range(8)]
    write_jsonl(project / "prompts.jsonl", rows)
    rewarded = {
        "data.train": [{"file": "prompts.jsonl"}],
        "data.validation": [],
        "rewards": [{"kind": "exact"}],
        "rollout": {"generations": 4, "max_new_tokens": 8},
        "loss": {"kind": "grpo"},
        "train": {"stage": "rl", "batch_size": 8, "max_steps": 5},
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in rewarded.items()]
    plan = plan_facts(Run.load(project / "tuned.yaml", overrides))
    assert (plan.updates, plan.targets, plan.unit) == (5, 5 * 8, "answers")
