"""What a folder of runs shows: which runs there are, how far they are, and which are alive."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.board.conftest import make_run, make_sort, record_line
from yrunner.storage.found_runs import FoundRuns, holder_of
from yrunner.storage.run_dir import CompareDir, write_json, write_text
from yrunner.storage.run_lock import run_lock


def test_every_kind_of_run_is_found_and_nothing_else(tmp_path: Path):
    make_run(tmp_path, "trained")
    sort = make_run(tmp_path, "sorted")
    make_sort(sort)
    sort.recipe.unlink()
    sort.fingerprint.unlink()
    compare = CompareDir(make_run(tmp_path, "deep/compared").folder)
    write_json(compare.table, {})
    make_run(compare.arms, "nlirg-0")
    (tmp_path / "notes").mkdir()
    make_run(tmp_path, ".hidden")
    make_run(tmp_path / "trained" / "checkpoints", "copy")
    found = FoundRuns(tmp_path).look()
    kinds = {id_: run.kind for id_, run in found.items()}
    assert kinds == {
        "trained": "train",
        "sorted": "sort",
        "deep/compared": "train",
        "deep/compared/arms/nlirg-0": "train",
    }


def test_the_folder_may_be_a_run_itself(tmp_path: Path):
    run = make_run(tmp_path, "one")
    (found,) = FoundRuns(run.folder).look().values()
    assert (found.id, found.name) == (".", "one")


def test_a_run_is_finished_interrupted_or_failed(tmp_path: Path):
    for name in ("finished", "stopped", "fresh", "killed", "exploded"):
        run = make_run(tmp_path, name, records=0 if name == "fresh" else 30)
        if name != "fresh":
            run.checkpoint(20 if name == "killed" else 30).mkdir(parents=True)
        if name == "finished":
            run.model.mkdir()
            write_json(run.result, {"step": 20, "last": 31})
        if name == "exploded":
            write_json(run.explosion, {"step": 30})
    found = FoundRuns(tmp_path).look()
    assert {name: run.state for name, run in found.items()} == {
        "finished": "finished",
        "stopped": "interrupted",
        "fresh": "interrupted",
        "killed": "failed",
        "exploded": "failed",
    }
    assert found["finished"].num_steps == 31
    assert [name for name, run in found.items() if run.can_resume] != []
    assert not found["finished"].can_resume and not found["fresh"].can_resume


def test_a_run_is_running_while_a_process_holds_its_lock(tmp_path: Path):
    run = make_run(tmp_path, "one", records=10)
    runs = FoundRuns(tmp_path)
    with run_lock(run.folder):
        found = runs.look()["one"]
        assert found.state == "running"
        # 10 of 20 updates are done; each has 100 targets, 50 in a second.
        assert (found.step, found.num_steps) == (10, 20)
        assert found.seconds_left == pytest.approx(20.0)
        holder = holder_of(run.folder)
        assert holder is not None and holder.pid == os.getpid()
    assert runs.look()["one"].state == "failed"


@pytest.mark.parametrize(
    "lock",
    [
        "",
        "[]",
        '{"pid": 1}',
        '{"pid": "x", "host": HOST, "since": "2026-01-01T00:00:00+00:00"}',
        '{"pid": PID, "host": "elsewhere", "since": "2999-01-01T00:00:00+00:00"}',
        '{"pid": PID, "host": HOST, "since": "2999-01-01T00:00:00+00:00"}',
        '{"pid": 99999999, "host": HOST, "since": "2999-01-01T00:00:00+00:00"}',
        '{"pid": PID, "host": HOST, "since": "yesterday"}',
    ],
)
def test_a_lock_file_alone_makes_no_run_alive(tmp_path: Path, lock: str):
    import socket

    run = make_run(tmp_path, "one")
    said = lock.replace("PID", str(os.getpid())).replace("HOST", json.dumps(socket.gethostname()))
    write_text(run.folder / ".lock", said)
    assert holder_of(run.folder) is None
    assert FoundRuns(tmp_path).look()["one"].state != "running"


def test_a_second_look_reads_only_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_run(tmp_path, "one")
    two = make_run(tmp_path, "two")
    runs = FoundRuns(tmp_path)
    runs.look()
    read: list[str] = []
    whole = FoundRuns._read
    monkeypatch.setattr(
        FoundRuns, "_read", lambda self, id_, *signs: read.append(id_) or whole(self, id_, *signs)
    )
    runs.look()
    assert read == []
    with two.metrics.open("a") as file:
        file.write(record_line(31, 30))
    assert runs.look()["two"].step == 31
    assert read == ["two"]


def test_links_to_the_outside_are_no_pages_and_no_runs(tmp_path: Path):
    root, outside = tmp_path / "outputs", tmp_path / "outside"
    run = make_run(root, "one")
    make_run(outside, "two")
    (root / "two").symlink_to(outside / "two")
    write_text(outside / "page.html", "secret")
    run.report.symlink_to(outside / "page.html")
    write_text(run.eval_page, "fine")
    runs = FoundRuns(root)
    assert list(runs.look()) == ["one"]
    assert runs.look()["one"].pages == ("eval",)
    assert runs.page("one", "report") is None
    assert runs.page("one", "eval") == run.eval_page.resolve()
    for id_ in ("..", "one/..", "/", "", "two", str(run.folder), "one/../one"):
        assert runs.files(id_) is None


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"recipe": 1}', "\x00", "- a\n"])
def test_damaged_files_leave_a_run_in_the_list(tmp_path: Path, content: str):
    run = make_run(tmp_path, "one")
    for path in (run.fingerprint, run.recipe, run.metrics, run.result):
        write_text(path, content)
    (found,) = FoundRuns(tmp_path).look().values()
    assert (found.step, found.loss) == (0, None)


def test_the_list_imports_nothing_heavy():
    program = (
        "import sys, yrunner.storage.found_runs\n"
        "assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
