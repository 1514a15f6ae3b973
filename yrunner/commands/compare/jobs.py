"""Run commands as parallel processes, each with a log; failures stay apart, Ctrl-C ends all."""

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import IO

import torch

from yrunner.console import format_duration, progress, say
from yrunner.distributed.launcher import COMMAND
from yrunner.errors import REPORT_A_BUG, Stopped
from yrunner.training.callbacks import on_stop_signals

SECONDS_BETWEEN_LOOKS = 0.2
TAIL_BYTES = 4096
COMMAND_MARK = "$ "
Command = tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """Commands that run one after another until one fails."""

    name: str
    commands: tuple[Command, ...]
    log: Path
    metrics: Path | None = None
    """The metrics.jsonl that shows its progress."""
    updates: int = 0
    """Its total number of updates."""


@dataclass(frozen=True)
class Failure:
    """Why a job failed."""

    message: str
    log: Path


def environments_for(jobs_at_once: int) -> list[dict[str, str]]:
    """Environment variables of each parallel job: its GPU, or its share of the CPU threads.

    A single job gets none, as under `yrun train`.
    """
    if jobs_at_once == 1:
        return [{}]
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else map(str, range(torch.cuda.device_count()))
        return [{"CUDA_VISIBLE_DEVICES": name} for name in islice(cycle(devices), jobs_at_once)]
    threads = max(1, torch.get_num_threads() // jobs_at_once)
    return [{"OMP_NUM_THREADS": str(threads)} for _ in range(jobs_at_once)]


def run_jobs(
    what: str, jobs: Sequence[Job], environments: Sequence[Mapping[str, str]]
) -> dict[str, Failure]:
    """Run the jobs, one at a time in each environment; return the failures by the job's name.

    A stop signal is passed on to all processes; `Stopped` is raised when they have ended. They also
    end if this process is killed.
    """
    # Raised at once, a signal could leave a process behind that is just starting.
    signals: list[int] = []
    waiting, free = list(jobs), list(environments)
    running: list[_Running] = []
    failures: dict[str, Failure] = {}
    total = sum(job.updates for job in jobs)
    bar = progress(what, total) if total else nullcontext(_show_nothing)
    with on_stop_signals(signals.append), _ending_all(running, signals), bar as advance:
        shown = 0
        while waiting or running:
            while waiting and free:
                job = waiting.pop(0)
                say(f"{job.name}: started ({len(jobs) - len(waiting)} of {len(jobs)}), {job.log}")
                running.append(_Running(job, free.pop(0)))
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for work in [work for work in running if work.has_ended()]:
                running.remove(work)
                free.append(work.environment)
                if failure := work.failure():
                    failures[work.job.name] = failure
                say(_outcome(work, failure, len(waiting) + len(running)))
            left = sum(job.updates for job in waiting) + sum(work.updates_left for work in running)
            advance(max(0, total - left - shown))
            shown = max(shown, total - left)
            if signals:
                raise Stopped(signals[0])
    return failures


class _Running:
    """A running job."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        self.job = job
        self.environment = environment
        self.started_at, self.started_time = time.monotonic(), time.time()
        self.commands = list(job.commands)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        self.log: IO[str] = job.log.open("w", encoding="utf-8")
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        command = self.commands.pop(0)
        self.log.write(f"{COMMAND_MARK}{shlex.join(command)}\n")
        self.log.flush()
        # In a new process group, Ctrl-C in the terminal reaches only us, and is passed on once.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self.environment, COMMAND: str(os.getpid())},
            process_group=0,
        )

    def has_ended(self) -> bool:
        """Whether the job has ended; starts the next command after a success."""
        if self.process.poll() is None:
            return False
        if self.process.returncode == 0 and self.commands:
            self.process = self._start()
            return False
        self.log.close()
        return True

    @property
    def updates_left(self) -> int:
        """Updates not logged yet."""
        metrics = self.job.metrics
        # A file of an earlier run does not count.
        if metrics is None or not metrics.exists() or metrics.stat().st_mtime < self.started_time:
            return self.job.updates
        return max(0, self.job.updates - _last_step(metrics))

    def failure(self) -> Failure | None:
        """Why it failed: the last line of its log."""
        code = self.process.returncode
        if code == 0:
            return None
        if code < 0:
            memory = ", perhaps out of memory" if -code == signal.SIGKILL else ""
            return Failure(f"ended by {signal.Signals(-code).name}{memory}", self.job.log)
        lines = self.job.log.read_text("utf-8", errors="replace").splitlines()
        printed = [line for line in lines if line.strip() and line != REPORT_A_BUG]
        message = printed[-1] if printed and not printed[-1].startswith(COMMAND_MARK) else ""
        return Failure(message or f"exited with code {code} without a message", self.job.log)


def _outcome(work: _Running, failure: Failure | None, num_left: int) -> str:
    took = format_duration(time.monotonic() - work.started_at)
    done = f"failed after {took}: {failure.message}" if failure else f"done in {took}"
    return f"{work.job.name}: {done}; {num_left:,} left"


@contextmanager
def _ending_all(running: Sequence[_Running], signals: Sequence[int]) -> Iterator[None]:
    """Leave no process behind: stop each one with a checkpoint; a second Ctrl-C kills it."""
    try:
        yield
    except Stopped:
        say("stopping: running trainings save a checkpoint; press Ctrl-C again to stop now")
        for work in running:
            work.process.send_signal(signal.SIGINT)
        while signal.SIGINT not in signals[1:] and any(
            work.process.poll() is None for work in running
        ):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        raise
    finally:
        for work in running:
            work.process.kill()
            work.log.close()


def _last_step(metrics: Path) -> int:
    """The update of the last complete record of a growing file."""
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else 0


def _show_nothing(_updates: int) -> None:
    """No-op progress bar for jobs without updates."""
