"""Checkpoints: whole, the right ones kept, and a resumed run that equals one never stopped."""

import json
import signal

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.training.conftest import checkpoint_every, weights_of
from yrunner.data.layouts import all_in_one_row
from yrunner.training.metrics_file import read_metrics

SETTINGS = dict(batch_size=3, gradient_accumulation_steps=2, epochs=2, learning_rate=1e-2)


def with_lora(model):
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear"))


@pytest.mark.parametrize(
    ("lora", "rows"),
    [
        (False, {}),
        (True, {}),
        (False, {"token_batch": 8}),
        (True, {"token_batch": 8}),
        (True, {"pack_to": 100, "layout": all_in_one_row, "epochs": 4}),
    ],
)
def test_resume_changes_nothing(make_model, examples, make_trainer, lora, rows):
    """Stopped in the middle of an epoch and resumed in new objects: equal bit for bit."""

    def run(folder):
        model = with_lora(make_model()) if lora else make_model()
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
    stopped.callback_handler.callbacks.insert(1, SignalAfter(5))
    with stopped.callback_handler.callbacks[0].stopping_on_signals():
        stopped.train()
    assert stopped.state.global_step == 5
    resumed, again = run("stopped")
    again.train(resume_from_checkpoint=str(again.run_dir.checkpoint(5)))
    assert torch.equal(weights_of(undisturbed), weights_of(resumed))
    measured = ("targets_per_second", "memory_gib")
    records = [
        [{key: value for key, value in row.items() if key not in measured} for row in rows]
        for rows in map(read_metrics, (trainer.run_dir.metrics, again.run_dir.metrics))
    ]
    # The stop itself was logged too; everything after it is the same, and nothing is doubled.
    assert records[0][-4:] == records[1][-4:]
    steps = [row["step"] for row in records[1] if "loss" in row]
    assert steps == sorted(set(steps))


class SignalAfter:
    """Sends SIGTERM to this process after some updates; every other event passes by."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            signal.raise_signal(signal.SIGTERM)

    def __getattr__(self, name):
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


def test_a_second_interrupt_stops_at_once(make_model, examples, make_trainer):
    trainer = make_trainer(make_model(), examples[:4])
    cadence = trainer.callback_handler.callbacks[0]
    # A shell lets what it runs in the background ignore Ctrl-C.
    before = signal.getsignal(signal.SIGINT)
    with cadence.stopping_on_signals():
        signal.raise_signal(signal.SIGINT)
        assert cadence.interrupted_by == signal.SIGINT
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
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.6, 2.7])
    evaluate = trainer.evaluate

    def told(**kwargs):
        metrics = evaluate(**kwargs) | {"eval_loss": next(losses)}
        return metrics

    trainer.evaluate = told
    trainer.train()
    assert trainer.run_dir.saved_steps() == [4, 10, 12]
    assert trainer.state.best_model_checkpoint == str(trainer.run_dir.checkpoint(4))
    assert not list(trainer.run_dir.checkpoints.glob(".*")), "nothing half-written is left"


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
    trainer.add_callback(JumpingLearningRate(at_step=8))
    trainer.train()
    losses = [
        row["eval_loss"] for row in read_metrics(trainer.run_dir.metrics) if "eval_loss" in row
    ]
    assert losses[-1] > min(losses) + 0.1, "the last model must be worse than the best"
    trainer.state.best_metric = None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


class JumpingLearningRate:
    def __init__(self, at_step):
        self.at_step = at_step

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == self.at_step:
            for group in optimizer.param_groups:
                group["lr"] = 1.0

    def __getattr__(self, name):
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


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
    losses = iter([3.0, 2.0, 2.1, 2.2, 2.3, 0.1, 0.1, 0.1])
    log = trainer.log
    trainer.evaluate = lambda **_: report(trainer, log, next(losses))
    trainer.train()
    assert trainer.state.global_step == 10
    assert trainer.state.best_global_step == 4


def report(trainer, log, loss):
    metrics = {"eval_loss": loss}
    log(dict(metrics))
    trainer.control = trainer.callback_handler.on_evaluate(
        trainer.args, trainer.state, trainer.control, metrics
    )
    return metrics


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


def test_a_checkpoint_that_is_being_written_has_no_final_name(make_model, examples, make_trainer):
    trainer = make_trainer(make_model(), examples[:4])

    def fail(folder):
        raise OSError(28, "No space left on device")

    trainer._save_optimizer_and_scheduler = fail
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert trainer.run_dir.saved_steps() == []


def test_a_record_cut_off_by_a_kill_is_passed_over(make_model, examples, make_trainer):
    trainer = make_trainer(make_model(), examples[:8], checkpoint=checkpoint_every(1))
    trainer.train()
    whole = read_metrics(trainer.run_dir.metrics)
    with trainer.run_dir.metrics.open("a") as file:
        file.write(json.dumps({"step": 3, "loss": 1.0})[:10])
    assert read_metrics(trainer.run_dir.metrics) == whole
