"""The run folder: whole files, and never two runs in one folder."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from yrunner.errors import RunError
from yrunner.storage.run_dir import (
    RunDir,
    differences,
    hash_files,
    page_beside,
    read_json,
    whole_folder,
    write_json,
    write_text,
)


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path):
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    write_text(run_dir.recipe, "name: run\n")
    with pytest.raises(RunError, match=r"already holds a run\. Resume it with --resume"):
        run_dir.create()


def test_clearing_removes_what_the_run_wrote_and_nothing_else(tmp_path: Path):
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    write_text(run_dir.recipe, "name: run\n")
    run_dir.checkpoint(10).mkdir(parents=True)
    (run_dir.folder / "my_notes.txt").write_text("mine")
    run_dir.clear()
    assert [path.name for path in run_dir.folder.iterdir()] == ["my_notes.txt"]


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path: Path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert read_json(path) == {"a": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["file.json"]


def test_only_whole_checkpoints_count_and_they_are_in_order_of_their_steps(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    assert run_dir.saved_steps() == []
    for name in ("step-100", "step-20", ".step-120.partial", "notes"):
        (run_dir.checkpoints / name).mkdir(parents=True)
    assert run_dir.saved_steps() == [20, 100]


def test_differences_are_named_by_their_dotted_keys():
    before = {"train": {"epochs": 3, "order": "shuffle"}, "seed": 1, "gone": 0}
    now = {"train": {"epochs": 4, "order": "shuffle"}, "seed": 1, "new": 0}
    assert differences(before, now) == ["gone", "new", "train.epochs"]
    assert differences(before, before) == []


def test_a_changed_byte_changes_the_hash(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"a" * 100_000)
    before = hash_files([path])
    path.write_bytes(b"a" * 99_999 + b"b")
    assert hash_files([path]) != before


def test_a_folder_has_its_final_name_only_when_it_is_whole(tmp_path: Path):
    final = tmp_path / "step-10"
    with whole_folder(final) as folder:
        (folder / "a").write_text("old")
        assert not final.exists()
    with pytest.raises(ValueError, match="on purpose"), whole_folder(final) as folder:
        (folder / "a").write_text("new")
        raise ValueError("on purpose")
    assert (final / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["step-10"]


def test_a_failure_on_a_full_disk_is_named_as_such(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with (
        pytest.raises(RunError, match=r"disk is full: .*step-10 could not be written; 0\.0 MB are"),
        whole_folder(tmp_path / "step-10"),
    ):
        raise RuntimeError("unexpected pos 3724288 vs 3724180")
    assert list(tmp_path.iterdir()) == []


def test_a_page_lies_beside_its_run_also_if_that_is_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    expected = tmp_path / "run-check.html"
    assert page_beside(Path("."), "check", None) == expected
    assert page_beside(tmp_path / "run", "check", None) == expected
