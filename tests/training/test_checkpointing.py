"""Checkpoints are whole or not used: damage is found, named and passed by."""

import re
from pathlib import Path

import pytest

from yrunner.errors import RunError
from yrunner.storage.run_dir import RunDir, whole_folder
from yrunner.training.checkpointing import (
    find_damage,
    newest_whole_step,
    remove_old,
    remove_unfinished,
    write_manifest,
)


def save(run_dir, *steps):
    for step in steps:
        with whole_folder(run_dir.checkpoint(step)) as folder:
            (folder / "model.safetensors").write_bytes(bytes(1000))
            (folder / "parts").mkdir()
            (folder / "parts" / "optimizer.pt").write_bytes(bytes([step]) * 500)
            write_manifest(folder)


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path / "run")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


DAMAGES = {
    r"parts/optimizer\.pt is not as it was written": flip_a_bit,
    r"parts/optimizer\.pt has 100 bytes and should have 500": lambda path: path.write_bytes(
        bytes(100)
    ),
    r"parts/optimizer\.pt is missing": Path.unlink,
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(run_dir, capfd, said):
    save(run_dir, 2, 4, 6)
    assert newest_whole_step(run_dir) == 6
    DAMAGES[said](run_dir.checkpoint(6) / "parts" / "optimizer.pt")
    assert newest_whole_step(run_dir) == 4
    assert re.search(f"step-6 is damaged: {said}", capfd.readouterr().err)
    assert run_dir.saved_steps() == [2, 4], "the damaged one does not count among the newest"


def test_a_checkpoint_without_a_manifest_is_not_trusted(run_dir):
    save(run_dir, 2)
    (run_dir.checkpoint(2) / "manifest.json").write_text("{")
    assert "manifest.json" in find_damage(run_dir.checkpoint(2))


def test_where_all_are_damaged_the_run_is_refused_and_without_any_it_begins_anew(run_dir):
    assert newest_whole_step(run_dir) is None
    save(run_dir, 2, 4)
    for step in (2, 4):
        flip_a_bit(run_dir.checkpoint(step) / "model.safetensors")
    with pytest.raises(RunError, match="no checkpoint in"):
        newest_whole_step(run_dir)


def test_the_last_whole_one_is_never_removed_to_make_room(run_dir):
    save(run_dir, 2, 4, 6, 8)
    (run_dir.checkpoint(8) / "model.safetensors").write_bytes(b"cut")
    remove_old(run_dir, keep=1, best=2)
    assert run_dir.saved_steps() == [2, 6]
    (run_dir.checkpoint(2) / "model.safetensors").unlink()
    (run_dir.checkpoint(6) / "model.safetensors").unlink()
    remove_old(run_dir, keep=1, best=None)
    assert run_dir.saved_steps() == [2, 6], "nothing is removed where none is whole"


def test_what_a_killed_process_left_half_written_goes(run_dir):
    save(run_dir, 2)
    for name in (".step-4.partial", ".step-2.previous", ".rehearsal"):
        (run_dir.checkpoints / name).mkdir()
    remove_unfinished(run_dir)
    assert [path.name for path in run_dir.checkpoints.iterdir()] == ["step-2"]
