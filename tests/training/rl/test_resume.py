"""Stopped anywhere in a cycle and resumed = never stopped, bit for bit."""

import json
import signal

import pytest
import torch

from tests.training.conftest import checkpoint_every, weights_of
from tests.training.preference.conftest import with_lora
from tests.training.test_resume import stop_by_signal
from yrunner.training.metrics import read_metrics

SETTINGS = dict(batch_size=4, gradient_accumulation_steps=4, learning_rate=1e-2, epochs=2)


def records(trainer):
    """What was logged, but for what the clock and the machine decide."""
    measured = ("targets_per_second", "memory_gib", "rollout_seconds")
    rows = read_metrics(trainer.run_dir.metrics)
    return [{key: row[key] for key in row if key not in measured} for row in rows]


@pytest.fixture
def started(make_talker, prompts, make_trainer):
    """Two epochs of two cycles of three updates, which are saved and validated now and then."""

    def start(folder, loss="grpo", **more):
        model = with_lora(make_talker(), trained=True, dropout=0.2)
        trainer = make_trainer(
            model,
            prompts,
            prompts[:3],
            loss=loss,
            folder=folder,
            checkpoint=checkpoint_every(5, keep=10),
            log_every=2,
            **{"rollout": {"updates_per_rollout": 3}, **SETTINGS, **more},
        )
        assert trainer.plan.num_updates == 12
        return model, trainer

    return start


def lines(trainer):
    return trainer.run_dir.rollouts.read_text("utf-8").splitlines()


def samples(trainer):
    return trainer.run_dir.rollout_tokens.read_text("utf-8").splitlines()


def often_equal(rows, answers):
    """One reward, of few values."""
    totals = [float(answer.ids[0] % 8 == 0) for answer in answers]
    return [[total, None] for total in totals], list(totals)


RESAMPLED = {"rollout": {"updates_per_rollout": 3, "resample": 2}, "score": often_equal}


@pytest.mark.parametrize(
    ("loss", "step", "how"),
    [
        ("grpo", 1, ""),
        ("grpo", 6, "keeps"),
        ("rloo", 4, ""),
        ("dapo", 4, "resamples"),
        ("ppo", 4, ""),
    ],
)
def test_resume_in_the_midst_of_a_cycle_changes_nothing(started, examples, loss, step, how):
    # A third of 24 rows are kept ones.
    kept = {"kept_rows": examples[20:26], "gradient_accumulation_steps": 6}
    more = {"": {}, "keeps": kept, "resamples": RESAMPLED}[how]
    undisturbed, trainer = started("undisturbed", loss, **more)
    trainer.train()
    rows = [row for row in records(trainer) if "loss" in row]
    assert all(("keep_divergence" in row) == (how == "keeps") for row in rows)
    assert any(row.get("replaced_groups") for row in rows) == (how == "resamples")
    _, stopped = started("stopped", loss, **more)
    assert stop_by_signal(stopped, step) == step
    saved = json.loads((stopped.run_dir.checkpoint(step) / "trainer_state.json").read_text())
    cycle = saved["stateful_callbacks"]["rollouts"]
    # The update that is cut off may be the first of its cycle.
    assert cycle["cycle"] == step // 3 and len(cycle["rollouts"]) == 16
    assert all(each["old"] for each in cycle["rollouts"])
    assert all(each["values"] and each["returns"] for each in cycle["rollouts"]) == (loss == "ppo")
    resumed, again = started("stopped", loss, **more)
    again.train(again.run_dir.checkpoint(step))
    assert torch.equal(weights_of(undisturbed), weights_of(resumed))
    assert records(trainer) == records(again)
    assert lines(trainer) == lines(again)
    assert samples(trainer) == samples(again)
    assert (len(lines(again)) > 4 * 16) == (how == "resamples")


@pytest.mark.parametrize("step", [0, 6])
def test_a_signal_while_answers_are_written_ends_the_run_and_is_made_good(started, step):
    undisturbed, trainer = started("undisturbed")
    trainer.train()
    _, stopped = started("stopped")

    def send():
        if stopped.state.global_step == step:
            signal.raise_signal(signal.SIGTERM)

    stopped.batches.before_collecting.append(send)
    with stopped.stop.listening():
        stopped.train()
    assert stopped.state.global_step == step and stopped.run_dir.saved_steps()[-1] == step
    resumed, again = started("stopped")
    again.train(again.run_dir.checkpoint(step))
    assert torch.equal(weights_of(undisturbed), weights_of(resumed))
    assert records(trainer) == records(again)
    assert lines(trainer) == lines(again)
    assert samples(trainer) == samples(again)


def test_a_killed_run_leaves_no_answers_that_its_checkpoint_does_not_know(started):
    """It may have written those of later cycles, and half a line."""
    _, trainer = started("run")
    trainer.train()
    before = lines(trainer)
    with trainer.run_dir.rollouts.open("a", encoding="utf-8") as file:
        file.write('{"cycle": 2, "text": "from a later cycle"}\n{"cycle": 3, "te')
    _, again = started("run")
    again.train(again.run_dir.checkpoint(5))
    assert lines(again) == before
