"""`yrun train --resume` as a person meets it: what may change, what is damaged, what was killed."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.yrun_process import SAID, start_yrun, wait_until
from yrunner.commands.train import train
from yrunner.errors import Interrupted, RunError
from yrunner.storage.run_dir import RunDir
from yrunner.training.metrics import MetricsFile

MODEL = Path("outputs/tuned/model/adapter_model.safetensors")


def run(*overrides, resume=False, overwrite=False):
    train(Path("tuned.yaml"), list(overrides), resume=resume, overwrite=overwrite)


@pytest.fixture
def stopped(trained_base, change, monkeypatch):
    """A run of 8 updates that a signal stopped in its sixth, with checkpoints after 2 and 4."""
    change("tuned.yaml", train__checkpoint={"every": 2}, eval__tasks=[])

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsFile, "on_step_end", interrupted)
        with pytest.raises(
            Interrupted, match=r"update 5 is saved.*Continue with: yrun train"
        ) as caught:
            run()
    assert caught.value.exit_code == 143
    return RunDir(Path("outputs/tuned"))


@pytest.fixture
def undisturbed(stopped):
    """The bytes of the model that the same run makes when nothing stops it."""
    run("output=outputs/undisturbed")
    return Path("outputs/undisturbed/model/adapter_model.safetensors").read_bytes()


def test_a_damaged_newest_checkpoint_is_passed_by_and_the_result_is_the_same(
    stopped, undisturbed, capfd
):
    optimizer = stopped.checkpoint(5) / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    # A process that was killed while it saved, and logged more than it saved.
    (stopped.checkpoints / ".step-6.partial").mkdir()
    with stopped.metrics.open("a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 8, "lo')
    run(resume=True)
    said = capfd.readouterr()
    assert re.search(r"step-5 is damaged: optimizer\.pt has [\d,]+ bytes and should", said.err)
    assert "resuming after update 4" in said.out
    assert MODEL.read_bytes() == undisturbed
    steps = [json.loads(line)["step"] for line in stopped.metrics.read_text().splitlines()]
    expected = Path("outputs/undisturbed/metrics.jsonl").read_text().splitlines()
    assert steps == [json.loads(line)["step"] for line in expected]
    assert {path.name for path in stopped.checkpoints.iterdir()} == {
        *(f"step-{step}" for step in stopped.saved_steps()),
        ".step-5.damaged",
    }


def test_what_may_change_is_listed_and_goes_on_and_nothing_else_does(stopped, capfd):
    with pytest.raises(RunError) as caught:
        run("train.learning_rate=1e-3", "train.epochs=3", resume=True)
    message = str(caught.value)
    assert "other settings: recipe.train.learning_rate. Set them back" in message
    assert "only these may change: train.epochs, train.max_steps, train.checkpoint.every" in message
    assert "train.log_every" in message and "train.trackers" in message
    assert "model.base is this recipe" in message
    with pytest.raises(RunError, match=r"update 5 is saved, but the recipe now ends after 4"):
        run("train.epochs=1", resume=True)
    run("train.epochs=3", "train.log_every=1", resume=True)
    assert "resuming with other settings: train.epochs" in capfd.readouterr().out
    assert stopped.saved_steps()[-1] == 12
    with pytest.raises(RunError, match=r"is finished, and train\.epochs has changed since"):
        run("train.epochs=4", resume=True)
    run("train.epochs=3", resume=True)


def test_killed_after_the_last_update_or_before_the_first_checkpoint(stopped, undisturbed, capfd):
    run(resume=True)
    for path in (stopped.after, stopped.report):
        path.unlink()
    shutil.rmtree(stopped.model)
    run(resume=True)
    assert MODEL.read_bytes() == undisturbed
    shutil.rmtree(stopped.model)
    shutil.rmtree(stopped.checkpoints)
    run(resume=True)
    assert "has no checkpoint yet: starting from the beginning" in capfd.readouterr().out
    assert MODEL.read_bytes() == undisturbed


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_trains(project):
    first = start_yrun("train", "base.yaml", "train.epochs=10000")
    wait_until(lambda: SAID.exists() and "step " in SAID.read_text(), first)
    try:
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(RunError, match=rf"is in use by process {first.pid} on "):
                train(Path("base.yaml"), [], **{"resume": False, "overwrite": False} | how)
    finally:
        first.kill()
        first.join()
