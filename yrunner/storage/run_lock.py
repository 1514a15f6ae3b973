"""Lock a run folder for one process; take over the stale lock of a dead one."""

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
from yrunner.storage.ownership import check_writable

LOCK = ".lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder; the folder and its parents are made, and removed if empty.

    The kernel drops the lock when its process dies for any reason; the file says who holds it.
    Raises `RunError` where another process holds it, or one on another machine may, and where the
    folder cannot be made.
    """
    check_writable(folder)
    made = [place for place in folder.parents if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = _open_locked(folder / LOCK)
    _check_last_holder(folder / LOCK, file)
    try:
        _sign(file)
        yield
    finally:
        # Remove the file before the lock: a process that waits for it must not lock a removed file.
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
    """Refuse a link: in a folder from somebody else, `.lock` could point to any file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _check_last_holder(path: Path, file: TextIO) -> None:
    """Take over the lock of a dead process; refuse where it may be alive on another machine."""
    last = _read(file)
    if not last:
        return
    if last["host"] != socket.gethostname():
        # Not every network file system shares locks between machines.
        file.close()
        raise RunError(
            f"{path.parent} is locked by {_name(last)}",
            remedy=f"if that process has ended, remove {path}",
        )
    say(f"{_name(last)} left a stale lock in {path.parent} (the process died); taking it over")


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
        f"{path.parent} is in use by {who}",
        remedy="wait for it, stop it, or set another output",
    )


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"
