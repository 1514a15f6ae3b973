"""Checkpoints: whole, the right ones kept, and a resumed run that equals one never stopped."""

import json
import math
import signal

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from tests.training.conftest import checkpoint_every, weights_of
from yrunner.data.batching.collate import all_in_one_row
from yrunner.errors import RunError
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.model import LoraTuning
from yrunner.recipe.schema.recipe import EarlyStopping
from yrunner.training.callbacks import Cadence
from yrunner.training.metrics import best_step, read_metrics

SETTINGS = dict(batch_size=3, gradient_accumulation_steps=2, epochs=2, learning_rate=1e-2)


def with_lora(model, dtype=torch.float32):
    torch.manual_seed(5)
    if dtype != torch.float32:
        return apply_tuning(model.to(dtype), LoraTuning(rank=4, dropout=0.3))
    return get_peft_model(model, LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear"))


@pytest.mark.parametrize(
    ("lora", "rows"),
    [
        (False, {}),
        (True, {}),
        (False, {"token_batch": 8}),
        (True, {"token_batch": 8}),
        (True, {"pack_to": 100, "layout": all_in_one_row, "epochs": 4}),
        (True, {"dtype": torch.bfloat16}),
    ],
)
def test_resume_changes_nothing(make_model, examples, make_trainer, lora, rows):
    """Stopped in the middle of an epoch and resumed in new objects: equal bit for bit."""

    def run(folder):
        dtype = rows.get("dtype", torch.float32)
        model = with_lora(make_model(), dtype) if lora else make_model()
        trainer = make_trainer(
            model,
            examples[8:],
            examples[:8],
            loss="nlirg",
            folder=folder,
            lr_scheduler="cosine",
            checkpoint=checkpoint_every(3, keep=10),
            log_every=2,
            **(SETTINGS | rows),
        )
        return model, trainer

    undisturbed, trainer = run("undisturbed")
    trainer.train()
    _, stopped = run("stopped")
    assert stop_by_signal(stopped, 4) == 4, "the update that was begun is cut off"
    resumed, again = run("stopped")
    again.train(again.run_dir.checkpoint(4))
    assert torch.equal(weights_of(undisturbed), weights_of(resumed))
    assert records(trainer) == records(again), "no gaps, no doubles, the same sums"


def records(trainer):
    """What was logged, but for what the clock and the machine decide."""
    measured = ("targets_per_second", "memory_gib")
    rows = read_metrics(trainer.run_dir.metrics)
    return [{key: row[key] for key in row if key not in measured} for row in rows]


def stop_by_signal(trainer, step, event="learn"):
    """Train until a signal comes after some updates; the update that is saved then.

    It comes in the midst of the next update, or at the event of a callback.
    """

    def send(*arguments, **keys):
        if trainer.state.global_step == step:
            signal.raise_signal(signal.SIGTERM)

    def learn_and_send(*arguments, **keys):
        learn(*arguments, **keys)
        send()

    learn = trainer.learn
    if event == "learn":
        trainer.learn = learn_and_send
    else:
        trainer.callbacks.insert(0, Sender())
        setattr(trainer.callbacks[0], event, send)
    with trainer.stop.listening():
        trainer.train()
    assert trainer.run_dir.saved_steps()[-1] == trainer.state.global_step
    return trainer.state.global_step


class Sender(TrainerCallback):
    """Gets its one event later."""


def test_a_second_interrupt_stops_at_once(make_model, examples, make_trainer):
    stop = make_trainer(make_model(), examples[:4]).stop
    # A shell lets what it runs in the background ignore Ctrl-C.
    before = signal.getsignal(signal.SIGINT)
    with stop.listening():
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_newest_checkpoints_and_the_best_are_kept(make_model, examples, make_trainer):
    trainer = make_trainer(
        make_model(),
        examples[8:],
        examples[:8],
        batch_size=16,
        epochs=6,
        checkpoint=checkpoint_every(2),
    )
    pretend_losses(trainer, [3.0, 1.0, 2.0, 2.5, 2.6, 2.7])
    trainer.train()
    assert trainer.run_dir.saved_steps() == [4, 10, 12]
    assert best_step(trainer.state.log_history) == 4
    assert not list(trainer.run_dir.checkpoints.glob(".*")), "nothing half-written is left"


def pretend_losses(trainer, losses):
    """Let the validations of a trainer find these losses."""
    validate, pretended = trainer.objective.validate, iter(losses)

    def find(*arguments):
        metrics = validate(*arguments)
        return metrics if trainer.stop.cuts_off else metrics | {"eval_loss": next(pretended)}

    trainer.objective.validate = find


@pytest.mark.parametrize("lora", [False, True])
def test_the_model_after_training_is_the_one_with_the_best_validation_loss(
    make_model, examples, make_trainer, lora
):
    model = with_lora(make_model()) if lora else make_model()
    trainer = make_trainer(
        model,
        examples[8:],
        examples[:8],
        batch_size=16,
        epochs=8,
        learning_rate=1e-2,
        # It is made worse on purpose half-way: the learning rate jumps.
        checkpoint=checkpoint_every(2, keep=1),
    )
    trainer.callbacks.append(JumpingLearningRate(trainer, after=8))
    trainer.train()
    losses = [
        row["eval_loss"] for row in read_metrics(trainer.run_dir.metrics) if "eval_loss" in row
    ]
    assert losses[-1] > min(losses) + 0.1, "the last model must be worse than the best"
    assert trainer.validate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


class JumpingLearningRate(TrainerCallback):
    def __init__(self, trainer, after):
        self.trainer = trainer
        self.after = after

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            for group in self.trainer.optimizer.param_groups:
                group["lr"] = 1.0


def test_early_stopping_waits_for_its_patience(make_model, examples, make_trainer):
    trainer = make_trainer(
        make_model(),
        examples[8:],
        examples[:8],
        batch_size=16,
        epochs=20,
        checkpoint=checkpoint_every(2),
        early_stopping={"patience": 3},
    )
    pretend_losses(trainer, [3.0, 2.0, 2.1, 2.2, 2.3, 0.1, 0.1, 0.1])
    trainer.train()
    assert trainer.state.global_step == 10
    assert best_step(trainer.state.log_history) == 4


@pytest.mark.parametrize(
    ("losses", "best", "stops"),
    [
        ([], None, False),
        ([2.0], 1, False),
        ([2.0, 2.0], 1, False),
        ([2.0, 2.0, 3.0], 1, True),
        ([2.0, 3.0, 1.9], 3, False),
        ([math.nan, 2.0, 3.0], 2, False),
        ([math.nan, math.nan, math.nan], None, True),
    ],
)
def test_a_validation_that_is_not_better_than_the_best_uses_up_patience(losses, best, stops):
    history = [{"loss": 1.0, "step": 1}]
    history += [{"eval_loss": loss, "step": step} for step, loss in enumerate(losses, 1)]
    assert best_step(history) == best
    cadence = Cadence(9, early_stopping=EarlyStopping(patience=2))
    assert cadence.stops_early(history) is stops


@pytest.mark.parametrize(
    ("event", "after", "stopped_at"),
    [
        ("learn", 0, 1),
        ("learn", 7, 7),
        ("on_step_end", 7, 7),
        ("on_prediction_step", 6, 6),
    ],
)
def test_a_signal_at_any_moment_changes_nothing(
    make_model, examples, make_trainer, event, after, stopped_at
):
    """Also the waiting of early stopping, and histograms that are half counted, are taken up."""

    def run(folder):
        trainer = make_trainer(
            with_lora(make_model()),
            examples[8:20],
            examples[:4],
            loss="nlirg",
            folder=folder,
            checkpoint=checkpoint_every(3, keep=3),
            early_stopping={"patience": 2},
            trackers=["tensorboard"],
            **SETTINGS | {"epochs": 8, "log_every": 2},
        )
        pretend_losses(trainer, [99.0] * 9)
        return trainer

    undisturbed = run("undisturbed")
    undisturbed.train()
    assert stop_by_signal(run("stopped"), after, event) == stopped_at
    validated = [row["step"] for row in records(undisturbed) if "eval_loss" in row]
    assert validated == [3, 6, 9]
    again = run("stopped")
    again.train(again.run_dir.checkpoint(stopped_at))
    assert torch.equal(weights_of(undisturbed.model), weights_of(again.model))
    assert records(undisturbed) == records(again)
    assert undisturbed.state.global_step == again.state.global_step == 9


def test_tensorboard_gets_every_record(make_model, examples, make_trainer):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(
        make_model(), examples[8:24], examples[:8], loss="nlirg", trackers=["tensorboard"]
    )
    trainer.train()
    events = EventAccumulator(str(trainer.run_dir.trackers))
    events.Reload()
    records = [row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row]
    for key in ("loss", "weighted_loss", "mean_weight", "zone_easy", "zone_refused"):
        (name,) = (tag for tag in events.Tags()["scalars"] if tag == f"train/{key}")
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in records]
    assert events.Scalars("eval/loss")


def test_a_checkpoint_that_is_being_written_has_no_final_name(
    make_model, examples, make_trainer, monkeypatch
):
    trainer = make_trainer(make_model(), examples[:4])

    def fail(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AcceleratedOptimizer, "state_dict", fail)
    with pytest.raises(RunError, match=r"the disk is full: .* it needs .* and .* are free\. Free"):
        trainer.train()
    assert list(trainer.run_dir.checkpoints.iterdir()) == []


def test_a_record_cut_off_by_a_kill_is_passed_over(make_model, examples, make_trainer):
    trainer = make_trainer(make_model(), examples[:8], checkpoint=checkpoint_every(1))
    trainer.train()
    whole = read_metrics(trainer.run_dir.metrics)
    with trainer.run_dir.metrics.open("a") as file:
        file.write(json.dumps({"step": 3, "loss": 1.0})[:10])
    assert read_metrics(trainer.run_dir.metrics) == whole
