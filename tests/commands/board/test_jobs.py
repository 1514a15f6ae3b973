"""What the page starts lives on without it, and is stopped and resumed as from a shell."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.board.conftest import RunningBoard, StartBoard, make_run, needs_extra
from tests.project import write_project
from yrunner.errors import RunError
from yrunner.storage.found_runs import RunFiles

pytestmark = needs_extra
HOLD = "import sys, time; from pathlib import Path\n"
HOLD += "from yrunner.storage.run_lock import run_lock\n"
HOLD += "with run_lock(Path(sys.argv[1])):\n    print(flush=True)\n    time.sleep(600)"


def wait_for(seen: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not seen():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.1)


def test_a_run_outlives_the_page_and_another_page_resumes_it(
    start_board: StartBoard, tmp_path: Path, forks: None
):
    write_project(tmp_path)
    root = tmp_path / "outputs"
    root.mkdir()
    board = start_board(root, tmp_path)
    assert {"base.yaml", "tuned.yaml"} <= set(board.get("/api/jobs")["recipes"])
    overrides = ["train.max_steps=2", "train.checkpoint.every=1"]
    asked = {"command": "train", "recipe": "base.yaml", "overrides": overrides}
    assert board.post("/api/start", asked)[0] == 200
    board.process.terminate()
    board.process.wait(timeout=60)
    wait_for((root / "base" / "report.html").exists)
    other = start_board(root, tmp_path)
    wait_for(lambda: not other.get("/api/jobs")["jobs"][0]["is_running"])
    (job,) = other.get("/api/jobs")["jobs"]
    assert job["command"] == ["yrun", "train", "base.yaml", *overrides]
    assert "Traceback" not in job["log"]
    assert not (root / "base" / ".lock").exists()

    (root / "base" / "model").rename(tmp_path / "model")
    (run,) = other.get("/api/runs")["runs"]
    assert run["can_resume"] and run["state"] == "interrupted"
    assert other.post("/api/resume", {"id": "base"})[0] == 200
    wait_for(lambda: not other.get("/api/jobs")["jobs"][0]["is_running"])
    job = other.get("/api/jobs")["jobs"][0]
    assert job["exit_code"] == 0, job["log"]
    assert other.get("/api/runs")["runs"][0]["state"] == "finished"


def test_a_run_that_somebody_started_elsewhere_is_stopped_by_its_lock(board: RunningBoard):
    folder = board.root / "two"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    assert {run["state"] for run in board.get("/api/runs")["runs"] if run["id"] == "two"} == {
        "running"
    }
    assert board.post("/api/resume", {"id": "two"})[1] == {"error": "two is running"}
    assert board.post("/api/stop", {"id": "two"})[0] == 200
    assert holder.wait(timeout=60) != 0
    status, said = board.post("/api/stop", {"id": "two"})
    assert status == 400 and said["error"] == "two is not running on this machine"


def test_a_lock_that_names_another_process_stops_nothing(board: RunningBoard):
    import os
    import socket

    lock = board.root / "two" / ".lock"
    said = {"pid": os.getpid(), "host": socket.gethostname(), "since": "2999-01-01T00:00:00+00:00"}
    lock.write_text(json.dumps(said))
    assert board.post("/api/stop", {"id": "two"})[0] == 400
    lock.unlink()


def test_a_faulty_recipe_ends_with_its_sentence_in_the_log(start_board: StartBoard, tmp_path: Path):
    root = tmp_path / "outputs"
    make_run(root, "one")
    (tmp_path / "x.yaml").write_text("name: x\ntuning:\n  kind: lora\n  rnak: 8\n")
    board = start_board(root, tmp_path)
    assert board.post("/api/start", {"command": "check", "recipe": "x.yaml"})[0] == 200
    wait_for(lambda: not board.get("/api/jobs")["jobs"][0]["is_running"])
    (job,) = board.get("/api/jobs")["jobs"]
    assert job["exit_code"] == 2
    assert "did you mean" in job["log"]


@pytest.mark.parametrize(
    ("command", "overwrite", "last"),
    [("train", True, "--overwrite"), ("train", False, "seed=1"), ("eval", True, "seed=1")],
)
def test_a_result_is_replaced_only_where_that_was_asked(
    tmp_path: Path, command: str, overwrite: bool, last: str
):
    from yrunner.commands.board.jobs import Jobs

    (tmp_path / "r.yaml").write_text("nonsense: 1\n")
    jobs = Jobs(tmp_path.resolve(), tmp_path.resolve())
    job = jobs.start(command, "r.yaml", ["seed=1"], overwrite=overwrite)
    assert job.arguments[-1] == last
    wait_for(lambda: jobs.listed()[0]["exit_code"] == 2)


@pytest.mark.parametrize("command", ["chat", "fetch", "", "train; rm", "--help"])
def test_only_known_commands_are_started(tmp_path: Path, command: str):
    from yrunner.commands.board.jobs import Jobs

    (tmp_path / "r.yaml").write_text("name: r\n")
    with pytest.raises(RunError, match="cannot be started here"):
        Jobs(tmp_path, tmp_path).start(command, "r.yaml", [])


def test_a_link_in_place_of_the_logs_is_refused(tmp_path: Path):
    from yrunner.commands.board.jobs import Jobs

    run, outside = make_run(tmp_path / "outputs", "one"), tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "outputs" / ".board").symlink_to(outside)
    with pytest.raises(RunError, match="is a link"):
        Jobs((tmp_path / "outputs").resolve(), tmp_path).resume(RunFiles(run.folder))
    assert list(outside.iterdir()) == []
