"""The runs below a folder: what each is, how far it is, and whether it is alive.

Only beginnings and ends of files are read, and nothing twice: a page of hundreds of runs looks
every few seconds.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from yrunner.storage.metric_curves import last_records, sampled_losses
from yrunner.storage.run_dir import ARMS, CompareDir, RunDir, SortDir
from yrunner.storage.run_files import is_inside, open_inside, read_inside
from yrunner.storage.run_lock import LOCK

RunState = Literal["running", "finished", "interrupted", "failed"]

DEEPEST = 5
"""Folders below the root in which runs are found: a comparison's arms lie two below it."""
NEVER_RUNS = {"checkpoints", "model", "merged", "gguf", "trackers", "sort", "replay"}
RECIPE_NAME, COMPARE_NAME = RunDir(Path()).recipe.name, CompareDir(Path()).table.name
SORT_NAME = RunDir(Path()).sort.name
"""By these a folder is known as that of a run."""
PAUSE = 20
"""How many times as long as a walk through all folders is the time until the next."""
SPARK = 24
"""Losses of the small curve in the list."""
LARGEST_RECORD = 4 * 2**20
"""Bytes of the largest JSON or YAML file of a run that is read for the list."""


@dataclass(frozen=True)
class FoundRun:
    """One run as the list shows it."""

    id: str
    """Its folder relative to the root; "." for the root itself."""
    name: str
    kind: Literal["train", "sort", "compare"]
    state: RunState
    stage: str
    loss_kind: str
    tuning: str
    base: str
    step: int
    num_steps: int | None
    """Updates of the whole run, as far as they are known."""
    loss: float | None
    validation_loss: float | None
    seconds_left: float | None
    num_bytes: int
    changed: float
    """Seconds since 1970."""
    spark: tuple[float, ...]
    """The loss so far, in few points."""
    pages: tuple[str, ...]
    has_model: bool
    can_resume: bool

    def as_json(self) -> dict[str, Any]:
        """For the page."""
        return asdict(self)


class RunFiles:
    """The files of a run that the list looks at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run, self.sort = RunDir(folder), SortDir(folder / SORT_NAME, ".jsonl")
        self.compare = CompareDir(folder)
        self.lock = folder / LOCK
        self.pages = {
            "report": self.run.report,
            "eval": self.run.eval_page,
            "sort": self.sort.report,
            "compare": self.compare.page,
            "tokens": folder.with_name(f"{folder.name}-tokens.html"),
            "check": folder.with_name(f"{folder.name}-check.html"),
        }
        """The pages that commands write about a run, in the order in which they are read."""
        run, sort = self.run, self.sort
        watched = (
            *(run.recipe, run.fingerprint, run.metrics, run.model, run.result, run.checkpoints),
            *(run.explosion, sort.recipe, sort.scores, self.compare.table, self.lock),
            *self.pages.values(),
        )
        self._watched = [str(path) for path in watched]

    def signs(self) -> tuple[tuple[int, int] | None, ...]:
        """Time in nanoseconds and size of every file that the list depends on."""
        return tuple(map(_sign, self._watched))


class FoundRuns:
    """All runs below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._files: dict[str, RunFiles] = {}
        self._known: dict[str, tuple[object, FoundRun]] = {}
        self._lock = threading.Lock()
        self._walks_from = 0.0

    def look(self) -> dict[str, FoundRun]:
        """Every run by its id, the last changed first."""
        with self._lock:
            self._walk()
            self._known = {id_: self._seen(id_) for id_ in self._files}
            runs = [run for _, run in self._known.values()]
        return {run.id: run for run in sorted(runs, key=lambda run: -run.changed)}

    def files(self, id_: str) -> RunFiles | None:
        """The files of a run; None for an id that `look` does not give."""
        if id_ not in self._files:
            self.look()
        files = self._files.get(id_)
        return files if files is not None and is_inside(files.folder, self.root) else None

    def page(self, id_: str, name: str) -> Path | None:
        """The file of a page of a run, such as `report`; None if there is none inside the root."""
        files = self.files(id_)
        path = files.pages.get(name) if files is not None else None
        return path if path is not None and is_inside(path, self.root) else None

    def _walk(self) -> None:
        """Look for folders of runs, in a tree of any size for a small share of the time."""
        started = time.monotonic()
        if started < self._walks_from:
            return
        ids = [str(path.relative_to(self.root)) for path in self._folders()]
        self._files = {
            id_: self._files.get(id_) or RunFiles(self.root.joinpath(id_)) for id_ in ids
        }
        ended = time.monotonic()
        self._walks_from = ended + PAUSE * (ended - started)

    def _folders(self) -> Iterator[Path]:
        """Folders of runs; links are not followed."""
        waiting = [(self.root, 0)]
        while waiting:
            folder, depth = waiting.pop()
            try:
                with os.scandir(folder) as entries:
                    names = {entry.name: entry for entry in entries}
            except OSError:
                continue
            is_sorted = SORT_NAME in names and (folder / SORT_NAME / RECIPE_NAME).is_file()
            if is_sorted or RECIPE_NAME in names or COMPARE_NAME in names:
                yield folder
            if depth < DEEPEST:
                waiting += [
                    (folder / name, depth + 1)
                    for name, entry in names.items()
                    if name not in NEVER_RUNS
                    and not name.startswith(".")
                    and entry.is_dir(follow_symlinks=False)
                ]

    def _seen(self, id_: str) -> tuple[object, FoundRun]:
        """What a run shows, read again only if one of its files has changed."""
        files, known = self._files[id_], self._known.get(id_)
        is_running = holder_of(files.folder) is not None
        sign = (is_running, files.signs())
        return known if known is not None and known[0] == sign else (sign, self._read(id_, *sign))

    def _read(
        self, id_: str, is_running: bool, signs: tuple[tuple[int, int] | None, ...]
    ) -> FoundRun:
        files = self._files[id_]
        run = files.run
        recipe = self.recipe(files)
        records, spark = self._metrics(run.metrics)
        step = int(records[-1]["step"]) if records else 0
        train = _section(recipe, "train")
        kind: Literal["train", "sort", "compare"] = "train"
        if not run.recipe.exists():
            kind = "compare" if files.compare.table.exists() else "sort"
        num_steps = self._num_steps(run, train, records)
        state = _state(files, is_running=is_running, kind=kind, step=step)
        has_model = run.model.is_dir()
        pages = [name for name, path in files.pages.items() if path.exists()]
        return FoundRun(
            id=id_,
            name=run.folder.name,
            kind=kind,
            state=state,
            stage=str(train.get("stage") or "sft"),
            loss_kind=str(_section(recipe, "loss").get("kind") or ""),
            tuning=str(_section(recipe, "tuning").get("kind") or ""),
            base=_base_name(_section(recipe, "model").get("base")),
            step=step,
            num_steps=num_steps,
            loss=_last(records, "loss"),
            validation_loss=_last(records, "eval_loss"),
            seconds_left=_seconds_left(records, num_steps) if state == "running" else None,
            num_bytes=_num_bytes(run.folder),
            changed=max((sign[0] for sign in signs if sign), default=0) / 1e9,
            spark=tuple(spark),
            pages=tuple(name for name in pages if is_inside(files.pages[name], self.root)),
            has_model=has_model,
            can_resume=kind == "train" and not has_model and bool(run.saved_steps()),
        )

    def _metrics(self, path: Path) -> tuple[list[dict[str, float]], list[float]]:
        try:
            with open_inside(path, self.root) as file:
                return last_records(file), sampled_losses(file, SPARK)
        except FileNotFoundError:
            return [], []

    def recipe(self, files: RunFiles) -> dict[str, Any]:
        """The resolved recipe; empty if it cannot be read.

        From JSON where it can be, without folders: that is read a hundred times faster.
        """
        with suppress(FileNotFoundError, ValueError):
            found = json.loads(read_inside(files.run.fingerprint, self.root, LARGEST_RECORD))
            return _section(found, "recipe")
        for path in (files.run.recipe, files.sort.recipe):
            with suppress(FileNotFoundError, ValueError, yaml.YAMLError):
                found = yaml.load(read_inside(path, self.root, LARGEST_RECORD), _LOADER)
                return found if isinstance(found, dict) else {}
        return {}

    def _num_steps(
        self, run: RunDir, train: dict[str, Any], records: list[dict[str, float]]
    ) -> int | None:
        """Updates of the whole run: known at its end, before that by the epoch of its log."""
        with suppress(FileNotFoundError, ValueError):
            result = json.loads(read_inside(run.result, self.root, LARGEST_RECORD))
            if isinstance(result, dict) and isinstance(result.get("last"), int):
                return int(result["last"])
        if isinstance(train.get("max_steps"), int):
            return int(train["max_steps"])
        epochs = train.get("epochs")
        reached = next((record for record in reversed(records) if record.get("epoch")), None)
        if reached is None or not isinstance(epochs, int | float):
            return None
        return max(round(reached["step"] / reached["epoch"] * epochs), int(reached["step"]))


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def holder_of(folder: Path) -> psutil.Process | None:
    """The process of this machine that holds the lock of a run folder; None if none does.

    The lock file alone proves nothing, since it may be stale or somebody else's: the process must
    have it open.
    """
    path = folder / LOCK
    try:
        if path.is_symlink() or path.stat().st_size > LARGEST_RECORD:
            return None
        said = json.loads(path.read_text("utf-8"))
        if said["host"] != socket.gethostname():
            return None
        process = psutil.Process(int(said["pid"]))
        started = datetime.fromisoformat(said["since"]).timestamp()
        if process.create_time() > started + 1:
            return None
        real = str(path.resolve())
        return process if any(file.path == real for file in process.open_files()) else None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None


def _sign(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _state(files: RunFiles, *, is_running: bool, kind: str, step: int) -> RunState:
    """A run that was stopped has saved its last update; one that has not saved it has failed."""
    run = files.run
    if is_running:
        return "running"
    if run.model.exists() or kind == "compare":
        return "finished"
    if kind == "sort":
        return "finished" if files.sort.scores.exists() else "interrupted"
    saved = max(run.saved_steps(), default=0)
    return "failed" if run.explosion.exists() or step > saved else "interrupted"


def _seconds_left(records: list[dict[str, float]], num_steps: int | None) -> float | None:
    """By the speed of the last records: their targets, and how many were learned in a second."""
    timed = [record for record in records if record.get("targets_per_second")][-8:]
    if num_steps is None or len(timed) < 2:
        return None
    seconds = sum(it["targets"] / it["targets_per_second"] for it in timed[1:] if "targets" in it)
    num_done = timed[-1]["step"] - timed[0]["step"]
    if num_done <= 0:
        return None
    return max(0.0, num_steps - timed[-1]["step"]) * seconds / num_done


def _last(records: list[dict[str, float]], name: str) -> float | None:
    value = next((record[name] for record in reversed(records) if name in record), None)
    return value if value is not None and abs(value) < float("inf") else None


def _section(content: Any, name: str) -> dict[str, Any]:
    """A section of a file that may hold anything."""
    section = content.get(name) if isinstance(content, dict) else None
    return section if isinstance(section, dict) else {}


def _base_name(base: Any) -> str:
    text = str(base or "")
    return Path(text).name if text.startswith(("/", ".")) else text


def _num_bytes(folder: Path) -> int:
    """Bytes of a run with its checkpoints, without the arms of a comparison."""
    total = 0
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != ARMS]
        for name in files:
            with suppress(OSError):
                total += os.lstat(Path(place, name)).st_size
    return total
