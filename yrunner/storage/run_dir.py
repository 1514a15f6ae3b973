"""The folder of what a base has written, and its files.

The run folder: where a run leaves everything, and the only place that knows the names in it.

The folder of a sort: the names in it, and what of it may be replaced.
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
from yrunner.storage.ownership import check_belongings, remove


class ReplayDir:
    """`outputs/replay/<base>-<key>`: what one base wrote, whatever is trained from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = folder / "rows.jsonl"
        """To be learned from; it may be edited by hand."""
        self.held_out = folder / "held_out.jsonl"
        """For the gauge: nothing is ever learned from these."""
        self.dropped = folder / "dropped.jsonl"
        """What was of no use, and why."""
        self.record = folder / "replay.json"
        """The base, how it wrote, how many drafts there were, and what became of them."""
        self.lock = folder / ".lock"

    def tops(self, key: str) -> Path:
        """The base's likeliest tokens for some rows; see scoring/base_answers.py."""
        return self.folder / f"tops-{key}.safetensors"

    def fisher(self, key: str) -> Path:
        """What the base depends on; see training/fisher.py."""
        return self.folder / f"fisher-{key}.safetensors"


FULL_DISK = 2**20
"""Bytes: with less space left than this, a write that failed has failed for want of it."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Full is the disk, or a user's share of it, or the size that a file may have."""
STEP_FOLDER = re.compile(r"step-(\d+)")


class RunDir:
    """`outputs/<name>`; a file appears in it under its final name only when it is complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.recipe = self.folder / "recipe.resolved.yaml"
        self.environment = self.folder / "environment.json"
        self.fingerprint = self.folder / "fingerprint.json"
        self.data_report = self.folder / "data_report.json"
        self.metrics = self.folder / "metrics.jsonl"
        self.before = self.folder / "before.json"
        self.after = self.folder / "after.json"
        self.explosion = self.folder / "explosion.json"
        self.checkpoints = self.folder / "checkpoints"
        self.trackers = self.folder / "trackers"
        self.model = self.folder / "model"
        self.base = self.folder / "base.json"
        self.keep = self.folder / "keep.json"
        self.merged = self.folder / "merged"
        self.gguf = self.folder / "gguf"
        self.merge_figures = self.folder / "merge.json"
        self.eval = self.folder / "eval.json"
        self.eval_page = self.folder / "eval.html"
        self.measured = self.folder / "measured.json"
        self.report = self.folder / "report.html"

    @property
    def prepared(self) -> Path:
        """Tokenized data, shared by the runs that stand beside each other; see data/cache.py."""
        return self.folder.parent / ".prepared"

    @property
    def replay(self) -> Path:
        """Rows that bases wrote, shared by the runs that stand beside each other; see ReplayDir."""
        return self.folder.parent / "replay"

    @property
    def sort(self) -> Path:
        """What `yrun sort` leaves; a training neither needs nor removes it."""
        return self.folder / "sort"

    def create(self) -> None:
        """Make the folder. Raises `RunError` where a run is already in it."""
        if self.is_used():
            raise RunError(
                f"{self.folder} already holds a run",
                remedy="go on with it by --resume, replace it by --overwrite, "
                "or give this run another name",
            )
        self.folder.mkdir(parents=True, exist_ok=True)

    def is_used(self) -> bool:
        """True where a run has begun to write."""
        return self.recipe.exists() or self.checkpoints.exists() or self.model.exists()

    def is_finished(self) -> bool:
        """True where the trained model is complete: it is written last but for the report."""
        return self.model.exists()

    def check(self, *replaced: Path) -> None:
        """Raise `RunError` where work here would fail, leave the folder, or cost somebody a file.

        `replaced` are the folders that may be removed. The recipe is written first and removed
        last: without it, a folder `model` is not ours.
        """
        also_without_a_run = (self.eval, self.eval_page)
        places = [path for path in self._places() if path not in also_without_a_run]
        check_belongings(self.folder, self.recipe, places, replaced)

    def clear(self) -> None:
        """Remove what a run has written here, and nothing else. Raises `RunError` as `check`."""
        self.check(*self.folders())
        for path in self._places():
            if path != self.recipe:
                remove(path)
        remove(self.recipe)

    def folders(self) -> list[Path]:
        """The folders of a run, which hold files that libraries write."""
        return [self.checkpoints, self.trackers, self.model, self.merged, self.gguf]

    def _places(self) -> list[Path]:
        return [path for path in vars(self).values() if path != self.folder]

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after so many updates."""
        return self.checkpoints / f"step-{step}"

    def saved_steps(self) -> list[int]:
        """Updates after which there is a whole checkpoint, in order."""
        names = (STEP_FOLDER.fullmatch(path.name) for path in self.checkpoints.glob("step-*"))
        return sorted(int(match[1]) for match in names if match)


class CompareDir:
    """What `yrun compare` leaves in the run folder of its recipe, beside a run of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.arms = self.folder / "arms"
        self.table = self.folder / "compare.json"
        self.page = self.folder / "compare.html"

    def run(self, name: str) -> RunDir:
        """The run folder of one arm with one seed."""
        return RunDir(self.arms / name)

    def log(self, name: str) -> Path:
        """What the processes of a run have printed."""
        return self.arms / f"{name}.log"

    def base(self, name: str) -> Path:
        """What was measured of a base; see commands/compare_points.py."""
        return self.arms / f"{name}.json"


def partial_folder(final: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return final.with_name(f".{final.name}.partial")


@contextmanager
def whole_folder(final: Path, needed: int | None = None) -> Iterator[Path]:
    """Give a folder to write into that gets the name `final` when everything is on the disk.

    Where the writing fails nothing is left of it; raises `RunError` where the disk was full, which
    the libraries that write weights report in many ways. `needed`: bytes that will be written.
    """
    partial = partial_folder(final)
    remove(partial)
    try:
        # Within: Ctrl-C can come between any two lines.
        partial.mkdir(parents=True)
        check_room(final, needed)
        yield partial
        _flush(partial, *partial.rglob("*"))
    except BaseException as error:
        is_full = _wants_room(error, free_bytes(final))
        shutil.rmtree(partial, ignore_errors=True)
        if is_full:
            raise _full_disk(final, needed) from error
        raise
    _replace_folder(final, partial)


def free_bytes(place: Path) -> int:
    """What is free on the disk of a place that may not exist yet."""
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
        remedy="free some space; the last checkpoint is whole, go on from it by --resume",
    )


def _wants_room(error: BaseException, free: int) -> bool:
    """Whether a failure is one of room; libraries in Rust pass the number on in words only."""
    if free < FULL_DISK or (isinstance(error, OSError) and error.errno in NO_ROOM):
        return True
    return any(f"(os error {number})" in str(error) for number in NO_ROOM)


def _replace_folder(final: Path, partial: Path) -> None:
    """Put `partial` in the place of `final`, which is kept until that has worked."""
    previous = final.with_name(f".{final.name}.previous")
    if final.exists():
        # Only now: after a crash between the two renames, `previous` is the only copy.
        shutil.rmtree(previous, ignore_errors=True)
        final.rename(previous)
    partial.rename(final)
    _flush(final.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _flush(*paths: Path) -> None:
    """Wait until files, and the names in folders, are on the disk."""
    for path in paths:
        place = os.open(path, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)


@contextmanager
def whole_file(final: Path) -> Iterator[BinaryIO]:
    """Give a file to write into that gets the name `final` when all is written.

    A failure leaves nothing of it.
    """
    partial = final.with_name(f".{final.name}.partial")
    remove(partial)
    try:
        # "x": never through a link that somebody has put there.
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, final)
        _flush(final.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole, or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


def page_beside(run_folder: Path, what: str, page: Path | None) -> Path:
    """Where a page about a run is written: `page`, or beside its folder, named by `what`.

    Not inside, which holds only what the run itself has written. Raises `RunError` for a name that
    is none of a page: it could be a recipe or data, which the page would replace.
    """
    page = page or run_folder.with_name(f"{run_folder.name}-{what}.html")
    parents = [folder for folder in page.parents if folder.exists()]
    if page.suffix != ".html" or page.is_dir() or not parents[0].is_dir():
        raise RunError(f"{page} cannot be the page", remedy="name a file that ends in .html")
    return page


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON that people can read."""
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


DATA_ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")


class SortDir:
    """`outputs/<name>/sort`; `ending` is that of the data, such as `.jsonl`."""

    def __init__(self, folder: Path, ending: str) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.resolved.yaml"
        self.environment = folder / "environment.json"
        self.data_report = folder / "data_report.json"
        self.measured = folder / "measured"
        """Losses and entropies of all tokens, see scoring/score_file.py."""
        self.cross_fit = folder / "cross_fit"
        """The same by models that were trained for it, a folder for each fold."""
        self.sorted = folder / f"sorted{ending}"
        self.dropped = folder / f"dropped{ending}"
        self.reasons = folder / "dropped_reasons.jsonl"
        self.report = folder / "report.html"
        self.scores = folder / "scores.jsonl"

    def check(self, files: Iterable[Path], *, overwrite: bool) -> None:
        """Raise `RunError` where something would be lost: a finished sort, `files`, or others."""
        if any(file.resolve().parent == self.folder.resolve() for file in files):
            raise RunError(
                f"the data lies in {self.folder}, where the sorted rows would replace it",
                remedy="give this recipe another output",
            )
        check_belongings(self.folder, self.recipe, [*self._results(), self.measured])
        if self.scores.exists() and not overwrite:
            raise RunError(
                f"{self.folder} already holds a finished sort",
                remedy="replace it by --overwrite, which measures no row again that it has "
                "measured, or give this one another output",
            )

    def clear(self) -> None:
        """Make the folder, and remove the results of an earlier sort, but what it has measured."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self._results():
            remove(path)

    def _results(self) -> Iterator[Path]:
        """The results that are there, also of a sort whose data had another ending.

        What says that a sort is finished comes first.
        """
        names = [f"{name}{ending}" for name in ("sorted", "dropped") for ending in DATA_ENDINGS]
        rows = (self.folder / f"{name}{packed}" for name in names for packed in ("", ".gz"))
        for path in (self.scores, self.reasons, self.report, *rows):
            if path.exists():
                yield path
