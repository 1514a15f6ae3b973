"""Only files of a run are removed, no link is followed, and foreign files are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from yrunner.errors import RunError
from yrunner.storage.ownership import remove
from yrunner.storage.run_dir import RunDir, SortDir, whole_file, whole_folder, write_text
from yrunner.storage.run_lock import run_lock


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A finished run."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    write_text(run_dir.recipe, "name: run\n")
    for folder, name in (
        (run_dir.model, "model.safetensors"),
        (run_dir.checkpoint(4), "optimizer.pt"),
        (run_dir.trackers, "events.out.tfevents.1"),
    ):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(b"x")
    return run_dir


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(RunError) as refused:
        act()
    return str(refused.value)


@pytest.mark.parametrize(
    "place", ["model/notes.txt", "model/my_results.json", "checkpoints/step-4/copy/letter.odt"]
)
def test_a_strangers_file_in_a_folder_that_would_go_stops_the_removal_of_anything(
    run_dir: RunDir, place: str
):
    stranger = run_dir.folder / place
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_text("mine")
    before = sorted(run_dir.folder.rglob("*"))
    assert refusal(run_dir.clear).startswith(f"{stranger} was not written by yrunner and would be")
    assert sorted(run_dir.folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["model", "checkpoints", "report.html", "trackers"])
def test_a_folder_without_a_run_keeps_all_that_bears_a_name_of_ours(tmp_path: Path, name: str):
    """Such as a home with a folder `model`, where `output` points by mistake."""
    mine = tmp_path / name
    mine.write_text("mine") if "." in name else mine.mkdir()
    message = refusal(RunDir(tmp_path).clear)
    assert message.startswith(f"{mine} was not written by yrunner and would be overwritten")
    assert mine.exists()


def test_a_run_goes_and_nothing_of_it_stays(run_dir: RunDir):
    run_dir.clear()
    assert list(run_dir.folder.iterdir()) == []


def test_the_recipe_that_marks_a_run_goes_last(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch):
    """Killed half-way, what is left is still known to be ours."""

    def killed(path: Path) -> None:
        if path == run_dir.merged:
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr("yrunner.storage.run_dir.remove", killed)
    with pytest.raises(KeyboardInterrupt):
        run_dir.clear()
    monkeypatch.undo()
    assert run_dir.recipe.exists()
    run_dir.clear()
    assert list(run_dir.folder.iterdir()) == []


def test_a_folder_is_gone_under_its_name_before_its_first_file_is(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
):
    def killed(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(run_dir.model)
    assert not run_dir.is_finished()
    monkeypatch.undo()
    run_dir.model.mkdir()
    remove(run_dir.model)
    assert not list(run_dir.folder.glob(".model*"))


def test_a_link_out_of_the_run_folder_is_refused_and_its_target_stays(
    run_dir: RunDir, tmp_path: Path
):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "model.safetensors").write_text("mine")
    shutil.rmtree(run_dir.checkpoints)
    run_dir.checkpoints.symlink_to(outside)
    message = refusal(run_dir.check)
    assert "outside the run folder" in message
    assert refusal(run_dir.clear) == message
    remove(run_dir.checkpoints)
    assert not run_dir.checkpoints.is_symlink()
    assert (outside / "model.safetensors").read_text() == "mine"


def test_a_link_that_waits_where_a_file_is_written_is_not_followed(tmp_path: Path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / ".report.html.partial").symlink_to(mine)
    (tmp_path / ".model.partial").symlink_to(tmp_path / "elsewhere")
    with whole_file(tmp_path / "report.html") as file:
        file.write(b"ours")
    with whole_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("ours")
    assert mine.read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()
    assert (tmp_path / "report.html").read_bytes() == b"ours"


def test_a_file_where_the_run_folder_would_be_is_refused(tmp_path: Path):
    (tmp_path / "notes").write_text("mine")
    for folder in (tmp_path / "notes", tmp_path / "notes" / "run"):
        assert "notes is not a folder" in refusal(RunDir(folder).check)


def test_a_sort_removes_its_own_results_and_no_others(tmp_path: Path):
    folder = SortDir(tmp_path / "sort", ".jsonl")
    folder.clear()
    write_text(folder.recipe, "name: run\n")
    for name in (
        "sorted.csv",
        "sorted.jsonl.gz",
        "scores.jsonl",
        "sorted.xlsx",
        "sorted.by-me.txt",
    ):
        (folder.folder / name).write_text("x")
    folder.check([], overwrite=True)
    folder.clear()
    left = {path.name for path in folder.folder.iterdir()}
    assert left == {"recipe.resolved.yaml", "sorted.xlsx", "sorted.by-me.txt"}


def test_results_that_no_sort_has_made_are_not_replaced(tmp_path: Path):
    (tmp_path / "sort").mkdir()
    (tmp_path / "sort/sorted.csv").write_text("mine")
    folder = SortDir(tmp_path / "sort", ".jsonl")
    message = refusal(lambda: folder.check([], overwrite=True))
    assert "sorted.csv was not written by yrunner" in message


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "{folder}/file cannot be the run folder: {folder}/file is not a folder"),
        ("file/run", "{folder}/file/run cannot be the run folder: {folder}/file is not a folder"),
        ("x" * 300, "cannot be the run folder: the name xxxx"),
        ("a/" + "é" * 200 + "/b", "cannot be the run folder: the name ééé"),
        ("/proc/run", "/proc is not writable"),
        ("/dev/null/run", "/dev/null/run cannot be the run folder: /dev/null is not a folder"),
    ],
)
def test_a_run_folder_that_cannot_be_made_is_refused_before_the_lock(
    tmp_path: Path, place: str, message: str
):
    (tmp_path / "file").write_text("mine")

    def lock() -> None:
        with run_lock(tmp_path / place):
            pytest.fail("the lock of a folder that cannot exist")

    assert message.format(folder=tmp_path) in refusal(lock)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
