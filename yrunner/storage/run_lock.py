"""One process at a time in a run folder; the lock of a dead one is recognised and taken over."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from yrunner.console import say
from yrunner.errors import RunError

LOCK = ".lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which is made where it is missing and gone again if empty,
    with the folders around it that were made for it.

    The kernel drops the lock when its process dies, whatever killed it; the file says who holds it.
    Raises `RunError` where another process does, or where one on another machine may.
    """
    made = [place for place in folder.parents if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = _open_locked(folder / LOCK)
    _look_at_the_last(folder / LOCK, file)
    try:
        _sign(file)
        yield
    finally:
        # The file goes before the lock: whoever waits for it then finds another file, and no lock.
        (folder / LOCK).unlink(missing_ok=True)
        file.close()
        with suppress(OSError):
            for place in (folder, *made):
                place.rmdir()


def _open_locked(path: Path) -> TextIO:
    while True:
        file = open(path, "a+", encoding="utf-8", opener=_without_links)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(file)
            file.close()
            raise _refusal(path, holder) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _without_links(path: str, flags: int) -> int:
    """A run folder may come from somebody else: what its `.lock` links to must not be emptied."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _look_at_the_last(path: Path, file: TextIO) -> None:
    """Say that a process died here, if one did; refuse where it may live on another machine."""
    last = _read(file)
    if not last:
        return
    if last["host"] != socket.gethostname():
        # Not every network file system shares its locks.
        file.close()
        raise RunError(
            f"{path.parent} was left by {_name(last)} without a word",
            remedy=f"if that process has ended, remove {path}",
        )
    say(f"{_name(last)} has died in {path.parent}: its lock is taken over")


def _sign(file: TextIO) -> None:
    file.seek(0)
    file.truncate()
    since = datetime.now(UTC).isoformat(timespec="seconds")
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": since}, file)
    file.flush()


def _read(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        return dict(json.loads(file.read()))
    except ValueError:
        return {}


def _refusal(path: Path, holder: dict[str, Any]) -> RunError:
    who = _name(holder) if holder else "another process"
    return RunError(
        f"{path.parent} is in use: {who} trains there",
        remedy="wait for it, stop it, or give this run another output",
    )


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"
