"""Two processes never train in one run folder; a dead one does not stand in the way."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from yrunner.errors import RunError
from yrunner.storage.run_lock import run_lock

HOLD = """
import sys, time
from pathlib import Path
from yrunner.storage.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_is_refused_and_told_who_holds_it_and_a_dead_one_is_recognised(
    tmp_path, holder, capfd
):
    folder = tmp_path / "run"
    with (
        pytest.raises(RunError, match=rf"run is in use by process {holder.pid} on \S+ \(since 20"),
        run_lock(folder),
    ):
        pytest.fail("two processes hold one lock")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (folder / ".lock").exists(), "it died without a word"
    with run_lock(folder):
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
    assert f"process {holder.pid} on {socket.gethostname()}" in capfd.readouterr().out
    assert not folder.exists(), "what held nothing but the lock goes with it"


def test_what_a_process_on_another_machine_left_is_not_taken_over(tmp_path):
    left = {"pid": 7, "host": "elsewhere", "since": "2026-01-01T00:00:00+00:00"}
    (tmp_path / ".lock").write_text(json.dumps(left))
    for _ in range(2):
        with pytest.raises(RunError, match=r"process 7 on elsewhere.*remove"), run_lock(tmp_path):
            pytest.fail("the other machine may still train")
    (tmp_path / ".lock").unlink()
    with run_lock(tmp_path):
        pass


def test_a_folder_with_a_run_stays(tmp_path):
    with run_lock(tmp_path):
        (tmp_path / "metrics.jsonl").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
