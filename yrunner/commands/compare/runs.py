"""Processes side by side: each writes a log, a failure stops no other, and Ctrl-C ends them all.

The runs of an experiment, each arm with each seed: what is there of them, and what is to do.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, NoReturn

from yrunner.assembly.identity import changes_since, fingerprint
from yrunner.assembly.run import Run
from yrunner.commands.compare.points import Measurement, measure_key
from yrunner.console import format_duration, progress, say
from yrunner.distributed.launcher import COMMAND
from yrunner.errors import REPORT_A_BUG, RunError, Stopped
from yrunner.recipe.arms import Arm
from yrunner.recipe.load import load_recipe
from yrunner.recipe.schema.recipe import Recipe
from yrunner.storage.run_dir import CompareDir, RunDir
from yrunner.training.callbacks import on_stop_signals

SECONDS_BETWEEN_LOOKS = 0.2
TAIL_BYTES = 4096
COMMAND_MARK = "$ "

Command = tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """Commands that are run one after the other, as far as each succeeds."""

    name: str
    commands: tuple[Command, ...]
    log: Path
    metrics: Path | None = None
    """The metrics.jsonl that tells how far it is."""
    updates: int = 0
    """Updates that it takes in all."""


@dataclass(frozen=True)
class Failure:
    """A job that did not succeed."""

    message: str
    log: Path


def run_jobs(
    what: str, jobs: Sequence[Job], environments: Sequence[Mapping[str, str]]
) -> dict[str, Failure]:
    """Run the jobs, one at a time in each environment; return the failures by the job's name.

    A signal that asks to stop is passed on to all processes, and `Stopped` is raised when they have
    ended. They end, too, where this process is killed.
    """
    # Raised at once, a signal could leave behind what is just begun.
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
                say(f"{job.name}: begins ({len(jobs) - len(waiting)} of {len(jobs)}), {job.log}")
                running.append(_Running(job, free.pop(0)))
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for work in [work for work in running if work.has_ended()]:
                running.remove(work)
                free.append(work.environment)
                if failure := work.failure():
                    failures[work.job.name] = failure
                say(_news(work, failure, len(waiting) + len(running)))
            left = sum(job.updates for job in waiting) + sum(work.updates_left for work in running)
            advance(max(0, total - left - shown))
            shown = max(shown, total - left)
            if signals:
                raise Stopped(signals[0])
    return failures


class _Running:
    """A job at work."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        self.job = job
        self.environment = environment
        self.started_at, self.began = time.monotonic(), time.time()
        self.commands = list(job.commands)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        self.log: IO[str] = job.log.open("w", encoding="utf-8")
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        command = self.commands.pop(0)
        self.log.write(f"{COMMAND_MARK}{shlex.join(command)}\n")
        self.log.flush()
        # A group of its own: Ctrl-C in the terminal reaches us alone, and is passed on once.
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
        """Whether nothing is left to do; begins the next command when one has succeeded."""
        if self.process.poll() is None:
            return False
        if self.process.returncode == 0 and self.commands:
            self.process = self._start()
            return False
        self.log.close()
        return True

    @property
    def updates_left(self) -> int:
        """Updates that it has not logged yet."""
        metrics = self.job.metrics
        # What an earlier run has left there tells nothing of this one.
        if metrics is None or not metrics.exists() or metrics.stat().st_mtime < self.began:
            return self.job.updates
        return max(0, self.job.updates - _last_step(metrics))

    def failure(self) -> Failure | None:
        """Why it failed, in the last words of its log."""
        code = self.process.returncode
        if code == 0:
            return None
        if code < 0:
            memory = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
            return Failure(f"ended by {signal.Signals(-code).name}{memory}", self.job.log)
        lines = self.job.log.read_text("utf-8", errors="replace").splitlines()
        said = [line for line in lines if line.strip() and line != REPORT_A_BUG]
        words = said[-1] if said and not said[-1].startswith(COMMAND_MARK) else ""
        return Failure(words or f"ended with code {code} and no word", self.job.log)


def _news(work: _Running, failure: Failure | None, num_left: int) -> str:
    took = format_duration(time.monotonic() - work.started_at)
    done = f"failed after {took}: {failure.message}" if failure else f"done in {took}"
    return f"{work.job.name}: {done}; {num_left:,} left"


@contextmanager
def _ending_all(running: Sequence[_Running], signals: Sequence[int]) -> Iterator[None]:
    """Leave no process behind: ask each to save and end; after another Ctrl-C, end it at once."""
    try:
        yield
    except Stopped:
        say("stopping: what is being trained saves a checkpoint first; Ctrl-C again: at once")
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
    """The update of the last whole record of a file that is being written."""
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else 0


def _show_nothing(_updates: int) -> None:
    """Take the place of a bar where nothing counts updates."""


YRUN = (sys.executable, "-m", "yrunner.cli")
ALL_CHECKPOINTS = 10**6
"""What `train.checkpoint.keep` is while an arm is trained: they stay until they are measured."""


@dataclass(frozen=True, eq=False)
class ArmRun:
    """One arm with one seed."""

    arm: str
    seed: int
    recipe: Recipe
    """With everything that the experiment sets, its own run folder too."""
    arguments: tuple[str, ...]
    """The recipe's path and the overrides that make this run of it."""

    @property
    def name(self) -> str:
        """Of its folder, its log and its line in tables."""
        return run_name(self.arm, self.seed)

    @property
    def run_dir(self) -> RunDir:
        """Where it leaves everything."""
        return RunDir(self.recipe.run_folder)

    @property
    def measurement(self) -> Measurement | None:
        """What was measured of it; None before all of it was."""
        found = Measurement.load(self.run_dir.measured)
        is_done = found is not None and found.is_complete and found.key == measure_key(self.recipe)
        return found if is_done and self.run_dir.is_finished() else None

    def changes(self) -> list[str]:
        """What differs between what is in its folder and what is asked for, beyond repair."""
        if not self.run_dir.fingerprint.exists():
            return []
        changes = changes_since(self.run_dir, self.recipe)
        found = Measurement.load(self.run_dir.measured)
        if found is not None and found.key != measure_key(self.recipe):
            # Without its checkpoints the curve cannot be measured anew.
            if set(found.steps) - set(self.run_dir.saved_steps()):
                changes.append("what is measured (eval, or its files)")
        return changes

    def job(self, updates: int, *, anew: bool) -> Job:
        """What is left to do: training, from a checkpoint where there is one, and measuring."""
        measure: Command = (*YRUN, "measure", *self.arguments)
        # Its tasks are answered by every checkpoint afterwards, and by the base once for all arms.
        train: Command = (*YRUN, "train", *self.arguments, "eval.tasks=[]")
        if self.run_dir.is_finished() and not anew:
            commands, updates = [measure], 0
        elif self.run_dir.saved_steps() and not anew:
            commands = [(*train, "--resume"), measure]
        else:
            # What lies there has no checkpoint, or is to be replaced.
            replacing = ["--overwrite"] if self.run_dir.is_used() else []
            commands = [(*train, *replacing), measure]
        log = CompareDir(self.run_dir.folder.parents[1]).log(self.name)
        return Job(self.name, tuple(commands), log, self.run_dir.metrics, updates)


def run_name(arm: str, seed: int) -> str:
    """How a run is called."""
    return f"{arm}-seed-{seed}"


def plan_runs(
    path: Path, overrides: Sequence[str], arms: Mapping[Arm, Recipe], seeds: Sequence[int]
) -> list[ArmRun]:
    """Every arm with every seed; all arms with the first seed come first."""
    runs = []
    for seed in seeds:
        for arm, recipe in arms.items():
            name = run_name(arm.name, seed)
            folder = CompareDir(recipe.run_folder).run(name).folder
            own = [
                *overrides,
                *arm.overrides,
                f"name={json.dumps(f'{recipe.name}-{name}')}",
                f"seed={seed}",
                f"output={json.dumps(str(folder), ensure_ascii=False)}",
                f"train.checkpoint.keep={ALL_CHECKPOINTS}",
            ]
            runs.append(ArmRun(arm.name, seed, load_recipe(path, own), (str(path), *own)))
    return runs


def refuse_changed(changed: Sequence[ArmRun]) -> NoReturn:
    """Raise `RunError`: these folders hold runs with other settings, and may be worth something."""
    first = changed[0]
    others = f" (and {len(changed) - 1:,} more runs)" if len(changed) > 1 else ""
    raise RunError(
        f"{first.run_dir.folder} was trained with other settings: "
        f"{', '.join(first.changes())}{others}",
        remedy="set them back, give the recipe another output, or train these runs anew with "
        "--overwrite",
    )


def base_name(recipe: Recipe) -> str:
    """Names a base and what is measured of it: arms that share both share the measurement."""
    what = [measure_key(recipe), recipe.model.base, fingerprint(recipe)["base"]]
    return f"base-{sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]}"


def base_jobs(runs: Sequence[ArmRun], folder: CompareDir) -> list[Job]:
    """What is to do before the arms: train each base that is missing, and measure it once."""
    jobs: dict[str, Job] = {}
    trained: set[str | None] = set()
    for run in runs:
        name, base = base_name(run.recipe), run.recipe.model.base
        file = folder.base(name)
        start = Run(run.recipe)
        if name in jobs or (start.stale_base is None and file.exists()):
            continue
        commands: list[Command] = [(*YRUN, "measure", *run.arguments, "--base", str(file))]
        if start.base is not None and start.stale_base is not None and base not in trained:
            commands.insert(0, (*YRUN, "train", str(base), *_how(start.base)))
            trained.add(base)
        jobs[name] = Job(name, tuple(commands), folder.log(name))
    return list(jobs.values())


def _how(base: Run) -> list[str]:
    """Resume a base that was not finished, replace one that has changed."""
    if not base.folder.is_used():
        return []
    return ["--resume"] if base.can_resume() else ["--overwrite"]
