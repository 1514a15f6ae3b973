"""The folders of runs, sorts and replay: the names of their files, and how they are written.

Only this file knows the names. A file or folder has its final name only when it is complete.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from yrunner.console import as_gigabytes
from yrunner.errors import RunError
from yrunner.storage.ownership import check_ownership, remove

FULL_DISK = 2**20
"""Bytes: with less free space than this, a failed write is blamed on the full disk."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk is full, or a quota or the largest size of a file is reached."""
STEP_FOLDER = re.compile(r"step-(\d+)")
ARMS = "arms"
DATA_ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")


class RunDir:
    """`outputs/<name>`: everything that a run leaves behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.recipe = self.folder / "recipe.resolved.yaml"
        self.environment = self.folder / "environment.json"
        self.fingerprint = self.folder / "fingerprint.json"
        self.data_report = self.folder / "data_report.json"
        self.metrics = self.folder / "metrics.jsonl"
        self.rollouts = self.folder / "rollouts.jsonl"
        self.rollout_tokens = self.folder / "rollout_tokens.jsonl"
        self.before = self.folder / "before.json"
        self.after = self.folder / "after.json"
        self.explosion = self.folder / "explosion.json"
        self.checkpoints = self.folder / "checkpoints"
        self.trackers = self.folder / "trackers"
        self.model = self.folder / "model"
        self.critic = self.folder / "critic"
        self.result = self.folder / "result.json"
        self.base = self.folder / "base.json"
        self.keep = self.folder / "keep.json"
        self.teacher = self.folder / "teacher.json"
        self.merged = self.folder / "merged"
        self.gguf = self.folder / "gguf"
        self.merge_figures = self.folder / "merge.json"
        self.eval = self.folder / "eval.json"
        self.eval_page = self.folder / "eval.html"
        self.measured = self.folder / "measured.json"
        self.report = self.folder / "report.html"

    @property
    def prepared(self) -> Path:
        """Tokenized data, shared by the runs of one outputs folder; see data/dataset/cache.py."""
        return self.folder.parent / ".prepared"

    @property
    def bases(self) -> Path:
        """Unpacked GGUF files, shared by the runs of one outputs folder."""
        return self.folder.parent / ".bases"

    @property
    def base_results(self) -> Path:
        """What bases answered in tasks, shared by the runs of one outputs folder and their arms."""
        is_arm = self.folder.parent.name == ARMS
        return self.folder.parents[2 if is_arm else 0] / ".base_results"

    @property
    def replay(self) -> Path:
        """Replay of all bases, shared by the runs of one outputs folder; see `ReplayDir`."""
        return self.folder.parent / "replay"

    @property
    def sort(self) -> Path:
        """The folder of `yrun sort`; training neither needs nor removes it."""
        return self.folder / "sort"

    def create(self) -> None:
        """Make the folder. Raises `RunError` where it already holds a run."""
        if self.is_used():
            raise RunError(
                f"{self.folder} already holds a run",
                remedy="resume it with --resume, replace it with --overwrite, or set output",
            )
        self.folder.mkdir(parents=True, exist_ok=True)

    def is_used(self) -> bool:
        """Whether a run has written anything."""
        return self.recipe.exists() or self.checkpoints.exists() or self.model.exists()

    def is_finished(self) -> bool:
        """Whether the trained model is complete; only the report is written after it."""
        return self.model.exists()

    def check(self, *replaced: Path) -> None:
        """Raise `RunError` where a run here would fail, leave the folder, or lose a foreign file.

        `replaced` are the folders that may be removed. The recipe is written first and removed
        last: without it, a folder `model` is not ours.
        """
        written_without_a_run = (self.eval, self.eval_page)
        places = [path for path in self._places() if path not in written_without_a_run]
        check_ownership(self.folder, self.recipe, places, replaced)

    def clear(self) -> None:
        """Remove what a run has written, and nothing else. Raises `RunError` as `check` does."""
        self.check(*self.folders())
        for path in self._places():
            if path != self.recipe:
                remove(path)
        remove(self.recipe)

    def folders(self) -> list[Path]:
        """The folders of a run, with files that libraries write."""
        return [
            self.checkpoints,
            self.trackers,
            self.model,
            self.critic,
            self.merged,
            self.gguf,
        ]

    def _places(self) -> list[Path]:
        return [path for path in vars(self).values() if path != self.folder]

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint at a step."""
        return self.checkpoints / f"step-{step}"

    def saved_steps(self) -> list[int]:
        """Steps with a complete checkpoint, in order."""
        names = (STEP_FOLDER.fullmatch(path.name) for path in self.checkpoints.glob("step-*"))
        return sorted(int(match[1]) for match in names if match)


class CompareDir:
    """The files of `yrun compare` in the run folder of its recipe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.arms = self.folder / ARMS
        self.table = self.folder / "compare.json"
        self.page = self.folder / "compare.html"

    def run(self, name: str) -> RunDir:
        """The run folder of one arm with one seed."""
        return RunDir(self.arms / name)

    def log(self, name: str) -> Path:
        """The output of a run's processes."""
        return self.arms / f"{name}.log"

    def base(self, name: str) -> Path:
        """The results of a base; see commands/compare/points.py."""
        return self.arms / f"{name}.json"


class SortDir:
    """`outputs/<name>/sort`; `ending` is the suffix of the data, such as `.jsonl`."""

    def __init__(self, folder: Path, ending: str) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.resolved.yaml"
        self.environment = folder / "environment.json"
        self.fingerprint = folder / "fingerprint.json"
        self.data_report = folder / "data_report.json"
        self.measured = folder / "measured"
        """Losses and entropies of all targets; see scoring/score_file.py."""
        self.cross_fit = folder / "cross_fit"
        """The same by cross-fit models, one folder per fold."""
        self.sorted = folder / f"sorted{ending}"
        self.dropped = folder / f"dropped{ending}"
        self.reasons = folder / "dropped_reasons.jsonl"
        self.report = folder / "report.html"
        self.scores = folder / "scores.jsonl"
        self.clusters = folder / "clusters.json"
        """What the rows of each cluster have in common; missing if there are no clusters."""

    @classmethod
    def finished(cls, folder: Path) -> "SortDir | None":
        """The finished sort in a folder, if any; the suffix of its data is that of its files."""
        for ending in (f"{ending}{packed}" for ending in DATA_ENDINGS for packed in ("", ".gz")):
            found = cls(folder, ending)
            if found.sorted.exists() and found.scores.exists():
                return found
        return None

    def count_rows(self) -> tuple[int, int]:
        """Rows kept and rows dropped by a finished sort."""
        total, dropped = (
            sum(1 for _ in path.open("rb")) if path.exists() else 0
            for path in (self.scores, self.reasons)
        )
        return total - dropped, dropped

    def check(self, files: Iterable[Path], *, overwrite: bool) -> None:
        """Raise `RunError` where a finished sort, a data file or a foreign file would be lost."""
        if any(file.resolve().parent == self.folder.resolve() for file in files):
            raise RunError(
                f"the data is in {self.folder}, and sorting would overwrite it",
                remedy="set another output",
            )
        check_ownership(self.folder, self.recipe, [*self._results(), self.measured])
        if self.scores.exists() and not overwrite:
            raise RunError(
                f"{self.folder} already holds a finished sort",
                remedy="replace it with --overwrite, which reuses scores, or set another output",
            )

    def clear(self) -> None:
        """Make the folder, and remove the results of an earlier sort, except its scores."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self._results():
            remove(path)

    def _results(self) -> Iterator[Path]:
        """The existing results, also of data with another suffix.

        The file that marks a sort as finished comes first.
        """
        names = [f"{name}{ending}" for name in ("sorted", "dropped") for ending in DATA_ENDINGS]
        rows = (self.folder / f"{name}{packed}" for name in names for packed in ("", ".gz"))
        for path in (self.scores, self.reasons, self.report, self.clusters, *rows):
            if path.exists():
                yield path


class ReplayDir:
    """`outputs/replay/<base>-<key>`: the rows that one base wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = folder / "rows.jsonl"
        """Rows to train on; they may be edited by hand."""
        self.held_out = folder / "held_out.jsonl"
        """Rows to measure drift on; never trained on."""
        self.dropped = folder / "dropped.jsonl"
        """Unusable rows, and why."""
        self.record = folder / "replay.json"
        """The base, how it wrote, and how many rows were kept and dropped."""
        self.lock = folder / ".lock"

    def tops(self, key: str) -> Path:
        """The base's likeliest tokens for some rows; see scoring/base_predictions.py."""
        return self.folder / f"tops-{key}.safetensors"

    def fisher(self, key: str) -> Path:
        """The Fisher information of the base; see training/ewc.py."""
        return self.folder / f"fisher-{key}.safetensors"


def page_beside(run_folder: Path, what: str, page: Path | None) -> Path:
    """The path of a page about a run: `page`, or beside its folder, named by `what`.

    Not inside, which holds only what the run itself has written. Raises `RunError` for a name
    without `.html`: it could be a recipe or data that the page would overwrite.
    """
    folder = run_folder if run_folder.name.strip(".") else run_folder.resolve()  # "." has no name
    page = page or folder.with_name(f"{folder.name}-{what}.html")
    parents = [folder for folder in page.parents if folder.exists()]
    if page.suffix != ".html" or page.is_dir() or not parents[0].is_dir():
        raise RunError(f"{page} is not a writable .html path", remedy="give another file name")
    return page


def partial_folder(final: Path) -> Path:
    """The temporary name of a folder while it is written."""
    return final.with_name(f".{final.name}.partial")


@contextmanager
def whole_folder(final: Path, needed: int | None = None) -> Iterator[Path]:
    """A folder to write into, which is renamed to `final` when everything is on the disk.

    A failure leaves nothing of it. Raises `RunError` for a full disk, which libraries report in
    many ways. `needed`: bytes that will be written.
    """
    partial = partial_folder(final)
    remove(partial)
    try:
        # Inside `try`: Ctrl-C may come between any two lines.
        partial.mkdir(parents=True)
        check_room(final, needed)
        yield partial
        _flush(partial, *partial.rglob("*"))
    except BaseException as error:
        is_full = _is_full_disk(error, free_bytes(final))
        shutil.rmtree(partial, ignore_errors=True)
        if is_full:
            raise _full_disk(final, needed) from error
        raise
    _replace_folder(final, partial)


def free_bytes(place: Path) -> int:
    """Free bytes on the disk of a path that may not exist yet."""
    existing = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def check_room(place: Path, needed: int | None) -> None:
    """Raise `RunError` where fewer than `needed` bytes are free for `place`."""
    if needed is not None and needed > free_bytes(place):
        raise _full_disk(place, needed)


def _full_disk(place: Path, needed: int | None) -> RunError:
    need = "" if needed is None else f"it needs {as_gigabytes(needed)}, and "
    free = as_gigabytes(free_bytes(place))
    return RunError(
        f"the disk is full: {place} could not be written; {need}{free} are free",
        remedy="free some space, then run it again; a training with a checkpoint goes on with "
        "--resume",
    )


def _is_full_disk(error: BaseException, free: int) -> bool:
    """Whether a write failed for lack of space; Rust libraries give the error number as text."""
    if free < FULL_DISK or (isinstance(error, OSError) and error.errno in NO_ROOM):
        return True
    return any(f"(os error {number})" in str(error) for number in NO_ROOM)


def _replace_folder(final: Path, partial: Path) -> None:
    """Rename `partial` to `final`; the old `final` is removed only after that."""
    previous = final.with_name(f".{final.name}.previous")
    if final.exists():
        # Not earlier: after a crash between the two renames, `previous` is the only copy.
        shutil.rmtree(previous, ignore_errors=True)
        final.rename(previous)
    partial.rename(final)
    _flush(final.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _flush(*paths: Path) -> None:
    """Wait until files and the entries of folders are on the disk."""
    for path in paths:
        place = os.open(path, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)


@contextmanager
def whole_file(final: Path) -> Iterator[BinaryIO]:
    """A file to write into, which is renamed to `final` when it is complete.

    A failure leaves nothing of it.
    """
    partial = final.with_name(f".{final.name}.partial")
    remove(partial)
    try:
        # "x": never write through a link that somebody put there.
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, final)
        _flush(final.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a file that `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def hash_files(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file's content, by its path."""
    hashes = {}
    for path in files:
        with path.open("rb") as file:
            hashes[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys, dotted, whose values differ between two nested mappings."""
    changed = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += [f"{key}.{inner}" for inner in differences(old, new)]
        elif old != new:
            changed.append(str(key))
    return changed
