"""Processes side by side: their order, their failures, and how they are ended."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.yrun_process import HANGS_AFTER
from yrunner.commands.compare import jobs
from yrunner.commands.compare.jobs import Failure, Job, run_jobs
from yrunner.console import progress
from yrunner.training.callbacks import MEANINGS


def python(program: str) -> tuple[str, ...]:
    return (sys.executable, "-c", program)


@pytest.fixture
def job(tmp_path):
    def make(name: str, *programs: str, **more) -> Job:
        return Job(name, tuple(map(python, programs)), tmp_path / "logs" / f"{name}.log", **more)

    return make


def test_the_commands_of_a_job_follow_each_other_and_all_they_print_is_in_its_log(job, capfd):
    both = job("both", "print('first')", "import sys; print('second', file=sys.stderr)")
    assert run_jobs("runs", [both], [{}]) == {}
    lines = both.log.read_text().splitlines()
    assert [line for line in lines if not line.startswith("$ ")] == ["first", "second"]
    assert sum(line.startswith("$ ") for line in lines) == 2
    assert "both: started (1 of 1)" in capfd.readouterr().out


def test_a_failure_ends_its_own_job_and_no_other(job, tmp_path, capfd):
    after = tmp_path / "after"
    jobs = [
        job("told", "import sys; sys.exit('set a key')", f"open({str(after)!r}, 'w')"),
        job("bug", "raise ValueError('a bug'); "),
        job("killed", "import os; os.kill(os.getpid(), 9)"),
        job("silent", "import sys; sys.exit(2)"),
        job("fine", "print('fine')"),
    ]
    failures = run_jobs("runs", jobs, [{}, {}])
    assert failures == {
        "told": Failure("set a key", jobs[0].log),
        "bug": Failure("ValueError: a bug", jobs[1].log),
        "killed": Failure("ended by SIGKILL, perhaps out of memory", jobs[2].log),
        "silent": Failure("exited with code 2 without a message", jobs[3].log),
    }
    assert not after.exists(), "what follows a failure is not begun"
    said = capfd.readouterr().out
    assert re.search(r"told: failed after \d+:\d\d: set a key", said)
    assert re.search(r"fine: done in \d+:\d\d", said)


def test_jobs_share_the_environments_one_at_a_time_each(job, tmp_path):
    note = tmp_path / "notes"
    program = textwrap.dedent(f"""
        import os, time
        place = os.environ["PLACE"]
        lock = os.open({str(tmp_path)!r} + "/" + place, os.O_CREAT | os.O_EXCL)
        time.sleep(0.3)
        os.unlink({str(tmp_path)!r} + "/" + place)
        with open({str(note)!r}, "a") as file: file.write(place)
    """)
    jobs = [job(f"job{number}", program) for number in range(4)]
    assert run_jobs("runs", jobs, [{"PLACE": "a"}, {"PLACE": "b"}]) == {}
    assert sorted(note.read_text()) == list("aabb")


def test_the_bar_counts_the_updates_that_a_run_logs_and_not_those_of_an_earlier_one(
    job, tmp_path, capfd, monkeypatch
):
    told = tmp_path / "told"
    told.touch()

    @contextmanager
    def noted(what, total):
        with progress(what, total) as advance:

            def note(number):
                advance(number)
                with told.open("a") as file:
                    file.write("." * number)

            yield note

    monkeypatch.setattr(jobs, "progress", noted)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps({"step": 10}) + "\n")
    os.utime(metrics, (1, 1))
    program = f"""
import json, os, time
for step in (3, 6):
    with open({str(metrics)!r}, "w" if step == 3 else "a") as file:
        file.write(json.dumps({{"step": step, "loss": 1.0}}) + "\\n" + '{{"step": 9')
        file.flush()
    while os.path.getsize({str(told)!r}) < step:
        time.sleep(0.01)
    with open({str(metrics)!r}, "w") as file: file.write('{{"step": 3}}\\n')
"""
    assert run_jobs("updates", [job("run", program, metrics=metrics, updates=12)], [{}]) == {}
    bar = [line for line in capfd.readouterr().err.splitlines() if line.startswith("updates: ")]
    assert bar == [
        "updates: 0/12",
        "updates: 3/12 (25 %)",
        "updates: 6/12 (50 %)",
        "updates: 12/12 (100 %)",
    ]


SHORT = """
import sys
from pathlib import Path
from yrunner.cli import main
from yrunner.commands.compare import jobs
child = '''
import signal, sys, time
from yrunner.distributed.launcher import die_with_command
die_with_command()
def stop(*_):
    open("saving", "w").close()
    time.sleep({seconds})
    open("saved", "w").close()
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
open("begun", "w").close()
time.sleep(3600)
'''
job = jobs.Job("run", ((sys.executable, "-c", child),), Path("run.log"))
import yrunner.cli
yrunner.cli.app = lambda: jobs.run_jobs("runs", [job, job], [{{}}])
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_lets_each_run_save_and_ends_with_its_code(tmp_path, forks, number):
    process = start(tmp_path, seconds=0.2)
    process.send_signal(number)
    said, _ = process.communicate(timeout=HANGS_AFTER)
    assert process.returncode == 128 + MEANINGS[number]
    assert "stopped. Run the same command again to continue" in said
    assert "Traceback" not in said
    assert (tmp_path / "saved").exists(), "the run was waited for"


@pytest.mark.parametrize(
    ("first", "second", "saved"),
    [
        (signal.SIGINT, signal.SIGINT, False),
        # As SLURM sends after its warning.
        (signal.SIGUSR1, signal.SIGTERM, True),
    ],
)
def test_only_a_person_who_asks_twice_ends_what_is_being_saved(
    tmp_path, forks, first, second, saved
):
    process = start(tmp_path, seconds=2 if saved else 3600)
    process.send_signal(first)
    # The run has been told, and has not saved yet.
    wait_for(tmp_path / "saving", process)
    process.send_signal(second)
    process.communicate(timeout=HANGS_AFTER)
    assert (tmp_path / "saved").exists() == saved
    assert process.returncode == 128 + MEANINGS[first]


def test_no_run_goes_on_when_the_command_is_killed(tmp_path, forks):
    process = start(tmp_path, seconds=0)
    (run,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs([run], timeout=HANGS_AFTER)
    assert not alive


def start(folder: Path, *, seconds: float) -> subprocess.Popen[str]:
    """A command that runs a job which takes so long to save when it is asked to stop."""
    process = subprocess.Popen(
        [sys.executable, "-c", SHORT.format(seconds=seconds)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(folder / "begun", process)
    return process


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    """Wait until the job has written a file."""
    deadline = time.monotonic() + HANGS_AFTER
    while not file.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
