"""A disk that fills while a checkpoint is written: a sentence, and nothing is lost."""

import subprocess

import pytest
import torch

from tests.training.conftest import checkpoint_every, weights_of
from yrunner.errors import RunError
from yrunner.training.checkpointing import Checkpointer, find_damage

ONE_AND_A_HALF = 600_000
"""Bytes of a disk: the first checkpoint fits, the second does not beside it."""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own beneath a run's checkpoints; gives a function that changes it."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    size = f"size={ONE_AND_A_HALF}"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a file system")

    def resize(num_bytes):
        subprocess.run(["mount", "-o", f"remount,size={num_bytes}", folder], check=True)

    yield resize
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_the_last_good_checkpoint_stays_and_with_more_room_the_run_goes_on(
    make_model, examples, make_trainer, small_disk, foreseen, monkeypatch
):
    """Also where no library says beforehand what it will write, and the write itself fails."""

    def run(folder):
        return make_trainer(
            make_model(), examples[:16], folder=folder, checkpoint=checkpoint_every(2)
        )

    undisturbed = run("undisturbed")
    undisturbed.train()
    full = run("run")
    if not foreseen:
        monkeypatch.setattr(Checkpointer, "_bytes", lambda self: None)
    needs = r"it needs 0\.\d MB, and " if foreseen else ""
    with pytest.raises(
        RunError, match=rf"full: \S+step-4 could not be written; {needs}0\.\d MB are"
    ):
        full.train()
    assert [path.name for path in full.run_dir.checkpoints.iterdir()] == ["step-2"]
    assert find_damage(full.run_dir.checkpoint(2)) is None
    small_disk(64 * 2**20)
    again = run("run")
    again.train(again.run_dir.checkpoint(2))
    assert torch.equal(weights_of(undisturbed.model), weights_of(again.model))
