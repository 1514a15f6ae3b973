"""Launching ranks: the first failure is reported, and no process is left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.yrun_process import HANGS_AFTER
from yrunner.distributed.launcher import RanksFailed, launch_command, run_ranks
from yrunner.distributed.topology import Topology
from yrunner.errors import RunError

LAUNCHER = """
import os, subprocess, sys
ranks = [
    subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True,
                     env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"})
    for rank in (0, 1)
]
sys.exit(max(rank.wait() for rank in ranks))
"""
"""A stand-in for torch's launcher, which takes seconds to start."""
RANK = """
import signal, sys, time
from pathlib import Path
from yrunner.errors import DataError, Interrupted
from yrunner.process import run_to_exit
from yrunner.distributed.launcher import current_rank, die_with_command, set_up_rank

rank = current_rank().rank
folder = Path({folder!r})

def work():
    (folder / str(rank)).touch()
    print("rank", rank, "speaks", flush=True)
    print("rank", rank, "warns", file=sys.stderr, flush=True)
{work}

{starts}
die_with_command()
run_to_exit(work, set_up_rank())
"""


def command(folder: Path, work: str, starts: str = "") -> list[str]:
    """The command that starts two ranks that do `starts` before they register, then `work`."""
    lines = "".join(f"    {line}\n" for line in work.strip().splitlines())
    rank = RANK.format(folder=str(folder), work=lines, starts=starts)
    return [sys.executable, "-c", LAUNCHER, rank]


def children() -> list[str]:
    """The commands of all living children, except helpers of Python that other tests started."""
    commands = [
        " ".join(process.cmdline())
        for process in psutil.Process().children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE
    ]
    return [command for command in commands if "resource_tracker" not in command]


def test_only_rank_0_speaks(tmp_path, capfd):
    run_ranks(command(tmp_path, "pass"), {})
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
    found = capfd.readouterr()
    assert (found.out, found.err) == ("rank 0 speaks\n", "rank 0 warns\n")


def test_the_first_failure_is_reported_with_its_exit_code_and_all_others_end(tmp_path, capfd):
    """The other rank would wait forever, as in an all-reduce."""
    work = """
if rank == 1:
    raise DataError(Path("rows.jsonl"), "row 7 is broken", remedy="mend it")
time.sleep(3600)
"""
    started = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        run_ranks(command(tmp_path, work), {})
    assert time.monotonic() - started < HANGS_AFTER
    assert str(caught.value) == "rows.jsonl: row 7 is broken. Mend it"
    assert caught.value.exit_code == 2
    assert "row 7" not in capfd.readouterr().err, "the caller prints it, once"
    assert children() == []


def test_a_bug_is_reported_with_its_traceback(tmp_path):
    with pytest.raises(RanksFailed, match=r"(?s)Traceback.*ZeroDivisionError") as caught:
        run_ranks(command(tmp_path, "1 / 0 if rank == 0 else time.sleep(3600)"), {})
    assert caught.value.exit_code == 1


def test_a_killed_process_ends_all_of_them(tmp_path):
    work = """
import os
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(3600)
"""
    started = time.monotonic()
    with pytest.raises(RunError, match="process 1 of the run was killed"):
        run_ranks(command(tmp_path, work), {})
    assert time.monotonic() - started < HANGS_AFTER
    assert children() == []


def test_what_breaks_because_another_was_killed_is_not_reported(tmp_path):
    work = """
import os, psutil
if rank == 1:
    (folder / "its pid").write_text(str(os.getpid()))
    (folder / "its pid").rename(folder / "pid")
    os.kill(os.getpid(), signal.SIGKILL)
while not (folder / "pid").exists():
    time.sleep(0.01)
while psutil.Process(int((folder / "pid").read_text())).status() != psutil.STATUS_ZOMBIE:
    time.sleep(0.01)
time.sleep(0.3)
raise RuntimeError("connection closed by peer")
"""
    with pytest.raises(RunError, match="process 1 of the run was killed"):
        run_ranks(command(tmp_path, work), {})


def test_a_rank_that_is_still_starting_when_another_fails_ends_too(tmp_path):
    """It wrote into the folder of the endings while that was removed, and outlived the command."""
    starts = """
if rank == 0:
    import os
    (folder / "its pid").write_text(str(os.getpid()))
    (folder / "its pid").rename(folder / "pid")
    time.sleep(60)
"""
    work = """
while not (folder / "pid").exists():
    time.sleep(0.01)
raise DataError(Path("rows.jsonl"), "row 7 is broken", remedy="mend it")
"""
    with pytest.raises(RanksFailed, match="row 7 is broken"):
        run_ranks(command(tmp_path, work, starts), {})
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process_once_and_all_report_how_they_ended(tmp_path, number):
    work = """
came = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: came.append(number))
(folder / f"ready-{rank}").touch()
while not came:
    time.sleep(0.01)
time.sleep(0.2 * rank)
(folder / f"stopped-{rank}-{len(came)}").touch()
raise Interrupted(came[0], 5, folder, remedy="go on")
"""

    def stop_when_ready() -> None:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop_when_ready, daemon=True).start()
    with pytest.raises(RanksFailed, match="update 5 is saved") as caught:
        run_ranks(command(tmp_path, work), {})
    assert caught.value.exit_code == 128 + number
    assert {path.name for path in tmp_path.glob("stopped-*")} == {"stopped-0-1", "stopped-1-1"}
    assert signal.getsignal(number) is not None
    assert children() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_while_the_ranks_start_stops_them(tmp_path, number):
    """It was lost, and the run went on."""
    starts = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of what a script starts in the background
(folder / f"starting-{rank}").touch()
while not (folder / "signalled").exists():
    time.sleep(0.01)
"""

    def stop_while_starting() -> None:
        while len(list(tmp_path.glob("starting-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        time.sleep(0.3)
        (tmp_path / "signalled").touch()

    threading.Thread(target=stop_while_starting, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(RanksFailed, match="stopped") as caught:
        run_ranks(command(tmp_path, "time.sleep(60)", starts), {})
    assert caught.value.exit_code == 128 + number
    assert time.monotonic() - started < HANGS_AFTER
    assert children() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_rank_stopped_while_it_imports_reports_so_itself(tmp_path, number):
    """Otherwise torch's launcher prints a long report of a failure."""
    work = """
from yrunner.process import exiting_on_interrupt
with exiting_on_interrupt():
    (folder / f"ready-{rank}").touch()
    time.sleep(3600)
"""
    rank = command(tmp_path, work)[-1]
    endings = tmp_path / "endings"
    endings.mkdir()
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "YRUNNER_ENDINGS": str(endings)}
    process = subprocess.Popen([sys.executable, "-c", rank], env=environment)
    while not (tmp_path / "ready-0").exists():
        time.sleep(0.01)
    process.send_signal(number)
    while not (endings / "0.json").exists():
        time.sleep(0.01)
    ending = json.loads((endings / "0.json").read_text())
    assert (ending["code"], ending["message"]) == (128 + number, "stopped")
    process.kill()
    process.wait()


def test_the_processes_end_when_the_command_is_killed(tmp_path):
    """`kill -9` of the command must not leave GPUs in use."""
    starting = command(tmp_path, "time.sleep(3600)")
    program = f"from yrunner.distributed.launcher import run_ranks; run_ranks({starting!r}, {{}})"
    outer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.05)
    ranks = [
        process
        for process in psutil.Process(outer.pid).children(recursive=True)
        if "set_up_rank" in " ".join(process.cmdline()) and LAUNCHER not in process.cmdline()
    ]
    assert len(ranks) == 2
    outer.kill()
    outer.wait()
    _, alive = psutil.wait_procs(ranks, timeout=HANGS_AFTER)
    assert not alive


def test_a_launcher_that_cannot_start_says_so():
    with pytest.raises(RunError, match="exited with code 7 before the run started"):
        run_ranks([sys.executable, "-c", "import sys; sys.exit(7)"], {})


def test_the_command_is_a_list_that_keeps_spaces_and_names_the_machine():
    alone = launch_command(Topology(2, num_ranks=2), ["train", "my recipe.yaml"])
    assert alone[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert alone[-4:] == ["-m", "yrunner.cli", "train", "my recipe.yaml"]
    assert "--standalone" in alone and "--nproc-per-node=2" in alone
    layout = Topology(8, num_machines=4, machine=3, address="node0:29501", num_ranks=32)
    of_many = launch_command(layout, ["train", "r.yaml"])
    assert of_many[3:7] == [
        "--nnodes=4",
        "--node-rank=3",
        "--master-addr=node0",
        "--master-port=29501",
    ]
