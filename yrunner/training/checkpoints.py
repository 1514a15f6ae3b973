"""Which checkpoints may be trusted: a manifest says what is in each, and is checked before use.

A checkpoint is written beside its place, flushed and renamed (`run_dir.whole_folder`). The manifest
is written last, over whatever files there are then, by one process after all have written.
"""

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from yrunner.belongings import remove
from yrunner.console import warn
from yrunner.errors import RunError
from yrunner.run_dir import RunDir, read_json, write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write down the size and the SHA-256 of every file of a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # Threads: hashing large files leaves the interpreter free.
    with ThreadPoolExecutor() as threads:
        entries = threads.map(_describe, files)
        names = [path.relative_to(folder).as_posix() for path in files]
        write_json(folder / MANIFEST, dict(zip(names, entries, strict=True)))


def find_damage(folder: Path, *, read_all: bool = True) -> str | None:
    """What is wrong with a checkpoint, in words; None where it is as it was written.

    Without `read_all` only sizes are compared, which costs nothing however large it is.
    """
    try:
        manifest: dict[str, dict[str, Any]] = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or cannot be read"
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size:,} bytes and should have {entry['size']:,}"
    if not read_all:
        return None
    with ThreadPoolExecutor() as threads:
        found = threads.map(_describe, [folder / name for name in manifest])
        pairs = zip(manifest.items(), found, strict=True)
        changed = next((name for (name, entry), now in pairs if now != entry), None)
    return None if changed is None else f"{changed} is not as it was written (another SHA-256)"


def newest_whole_step(run_dir: RunDir) -> int | None:
    """The update of the newest checkpoint that is whole; None where there is no checkpoint at all.

    Damaged ones after it are named, and put aside as `.step-N.damaged`: they must not count among
    the newest that are kept. Raises `RunError` where all are damaged.
    """
    steps = run_dir.saved_steps()
    for step in reversed(steps):
        folder = run_dir.checkpoint(step)
        damage = find_damage(folder)
        if damage is None:
            return step
        warn(f"the checkpoint {folder} is damaged: {damage}; the one before it is used")
        _put_aside(folder)
    if steps:
        raise RunError(
            f"none of the {len(steps)} checkpoints in {run_dir.checkpoints} is whole",
            remedy="bring one back from a copy, or start anew with --overwrite",
        )
    return None


def remove_old(run_dir: RunDir, *, keep: int, best: int | None) -> None:
    """Remove all checkpoints but the newest `keep` of full size and the one after update `best`.

    The last that is whole is never removed: one of another size does not count as kept.
    """
    steps = run_dir.saved_steps()
    whole = [step for step in steps if not find_damage(run_dir.checkpoint(step), read_all=False)]
    for step in set(steps) - {*whole[-keep:], best}:
        if whole:
            remove(run_dir.checkpoint(step))


def remove_unfinished(run_dir: RunDir) -> None:
    """Remove what a killed process has left half-written beside the checkpoints."""
    for pattern in (".*.partial", ".*.previous", ".rehearsal"):
        for folder in run_dir.checkpoints.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def _put_aside(folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    # Another process of the same run may have done so.
    with suppress(FileNotFoundError):
        folder.rename(aside)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}
