"""Commands that the page starts: each in a session of its own, so that it outlives the page."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import psutil

from yrunner.errors import RunError
from yrunner.storage.found_runs import RunFiles, holder_of
from yrunner.storage.run_dir import write_json
from yrunner.storage.run_files import is_inside, open_inside, read_inside

Command = Literal["train", "sort", "check", "eval"]

WITHOUT_CODE = "model.trust_remote_code=false"
"""A run folder may come from somebody else: a click must not run the code of its model."""
OVERWRITING = ("train", "sort")

OVERRIDE = re.compile(r"[a-z_][a-z_0-9]*(\.[a-z_0-9]+)*=.*")
MOST_OVERRIDES, LONGEST_OVERRIDE, MOST_RECIPES = 40, 500, 300
LOG_TAIL = 32 * 2**10
SHOWN_JOBS = 30
RECIPE_FOLDERS = (".", "recipes")
NOT_FROM_A_RANK = ("RANK", "YRUNNER_COMMAND")


@dataclass(frozen=True)
class BoardJob:
    """One started command."""

    id: str
    arguments: list[str]
    """Behind `yrun`."""
    pid: int
    created: float
    """When the process began, by which it is known from a later one with its number."""
    exit_code: int | None = None
    """None while it runs, and if it ended while no page was there."""


class Jobs:
    """Starts and stops commands; what they print is kept below the board's folder."""

    def __init__(self, root: Path, folder: Path) -> None:
        """`root`: the folder of the runs; `folder`: where commands run, and recipes lie."""
        self._root, self._here = root, folder
        self._folder = root / ".board"
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    def recipes(self) -> dict[str, Path]:
        """The recipes that can be started, by their path as one would type it."""
        found = {}
        for name in RECIPE_FOLDERS:
            for path in sorted((self._here / name).glob("*.yaml"))[:MOST_RECIPES]:
                if is_inside(path, self._here):
                    found[str(path.relative_to(self._here))] = path
        return found

    def start(
        self, command: str, recipe: str, overrides: Sequence[str], *, overwrite: bool = False
    ) -> BoardJob:
        """Start a command on one of `recipes`. Raises `RunError` for anything else.

        `overwrite`: replace an existing result, which is refused otherwise.
        """
        if command not in get_args(Command):
            raise RunError(f"{command[:40]!r} cannot be started here")
        if recipe not in self.recipes():
            raise RunError(f"there is no recipe {recipe[:80]!r} here")
        self._check(overrides)
        replaces = ["--overwrite"] if overwrite and command in OVERWRITING else []
        return self._start([command, recipe, *overrides, *replaces])

    def resume(self, files: RunFiles) -> BoardJob:
        """Continue a run from its last checkpoint, with the recipe that it has recorded."""
        if holder_of(files.folder) is not None:
            raise RunError(f"{files.folder.name} is running")
        if not is_inside(files.run.recipe, self._root):
            raise RunError(f"{files.folder.name} has no recipe to resume with")
        output = f"output={json.dumps(str(files.folder))}"  # a value is YAML
        return self._start(["train", str(files.run.recipe), output, WITHOUT_CODE, "--resume"])

    def stop(self, files: RunFiles) -> None:
        """Ask a run to save a checkpoint and end, as `kill` does."""
        process = holder_of(files.folder)
        if process is None:
            raise RunError(f"{files.folder.name} is not running on this machine")
        process.send_signal(signal.SIGTERM)

    def stop_job(self, id_: str) -> None:
        """The same for a command that the page has started."""
        job = self._jobs().get(id_)
        process = None if job is None else _process_of(job)
        if process is None:
            raise RunError("this command has ended")
        process.send_signal(signal.SIGTERM)

    def listed(self) -> list[dict[str, Any]]:
        """The last commands, newest first, each with what it printed last."""
        self._reap()
        found = self._jobs()
        # A process that is about to end has no command line any more, so a child is asked itself.
        with self._lock:
            running = set(self._children)
        running |= {id_ for id_, job in found.items() if _process_of(job) is not None}
        jobs = sorted(found.values(), key=lambda job: -job.created)[:SHOWN_JOBS]
        return [
            {
                "id": job.id,
                "command": ["yrun", *job.arguments],
                "started": job.created,
                "is_running": job.id in running and job.exit_code is None,
                "exit_code": job.exit_code,
                "log": self._log(job.id),
            }
            for job in jobs
        ]

    def _check(self, overrides: Sequence[str]) -> None:
        if len(overrides) > MOST_OVERRIDES:
            raise RunError("too many overrides")
        for text in overrides:
            if len(text) > LONGEST_OVERRIDE or not OVERRIDE.fullmatch(text):
                raise RunError(f"{text[:80]!r} is not key=value", remedy="write it like seed=1")
            key, _, value = text.partition("=")
            if key == "output" and not self._is_below_root(value):
                raise RunError("output must be a folder below that of the board")
            if key == "model" or key.endswith("trust_remote_code"):
                raise RunError(f"{key} can be set only in the recipe itself")

    def _is_below_root(self, output: str) -> bool:
        place = (self._here / output).resolve()
        return place != self._root and place.is_relative_to(self._root)

    def _start(self, arguments: list[str]) -> BoardJob:
        if self._folder.is_symlink():
            raise RunError(f"{self._folder} is a link", remedy="remove it")
        self._folder.mkdir(exist_ok=True)
        id_ = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        environment = {
            name: value for name, value in os.environ.items() if name not in NOT_FROM_A_RANK
        }
        with (self._folder / f"{id_}.log").open("xb") as log:
            child = subprocess.Popen(
                # -P: a file of the working folder is never imported in place of a library.
                [sys.executable, "-P", "-m", "yrunner.cli", *arguments],
                cwd=self._here,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        job = BoardJob(id_, arguments, child.pid, psutil.Process(child.pid).create_time())
        with self._lock:
            self._children[id_] = child
            self._write(job)
        return job

    def _reap(self) -> None:
        """Note the exit codes of commands that have ended."""
        with self._lock:
            ended = [id_ for id_, child in self._children.items() if child.poll() is not None]
            for id_ in ended:
                code = self._children.pop(id_).returncode
                job = self._jobs().get(id_)
                if job is not None:
                    self._write(replace(job, exit_code=code))

    def _write(self, job: BoardJob) -> None:
        write_json(self._folder / f"{job.id}.json", asdict(job))

    def _jobs(self) -> dict[str, BoardJob]:
        return {job.id: job for job in self._read_jobs()}

    def _read_jobs(self) -> Iterator[BoardJob]:
        for path in sorted(self._folder.glob("*.json"))[-SHOWN_JOBS:]:
            with suppress(FileNotFoundError, ValueError, TypeError):
                yield BoardJob(**json.loads(read_inside(path, self._root)))

    def _log(self, id_: str) -> str:
        try:
            with open_inside(self._folder / f"{id_}.log", self._root) as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(0, size - LOG_TAIL))
                return file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""


def _process_of(job: BoardJob) -> psutil.Process | None:
    """The process of a command; None if it has ended and its number may be another's."""
    try:
        process = psutil.Process(job.pid)
        is_same = abs(process.create_time() - job.created) < 0.01
        is_ours = "yrunner.cli" in process.cmdline()
        return process if is_same and is_ours else None
    except (psutil.Error, TypeError, ValueError):
        return None
