"""A data file must be the same from its first reading to its last, or it is said that it is not."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from yrunner.errors import DataError

State = tuple[int, int, int, int]
"""What changes with a file's content, and nobody can set back: inode, size, and two times."""


def states_of(files: Iterable[Path]) -> dict[Path, State]:
    """What the files are now; see `check_unchanged`. Raises `DataError` for one that is gone."""
    return {file: _state(file) for file in files}


def check_unchanged(states: Mapping[Path, State]) -> None:
    """Raise `DataError` where a file is no longer what it was when `states_of` looked at it."""
    for file, state in states.items():
        if _state(file) != state:
            raise DataError(
                file,
                "has changed while it was read",
                remedy="run the command again when nothing writes to it any more",
            )


@contextmanager
def unchanged(
    states: Mapping[Path, State], undo: Callable[[], None] | None = None
) -> Iterator[None]:
    """`check_unchanged` after what is done inside, also where that fails: it may be the reason.

    `undo` removes what was made of the files.
    """
    try:
        yield
    except Exception:
        _check(states, undo)
        raise
    _check(states, undo)


def _check(states: Mapping[Path, State], undo: Callable[[], None] | None) -> None:
    try:
        check_unchanged(states)
    except DataError:
        if undo is not None:
            undo()
        raise


def _state(file: Path) -> State:
    try:
        status = file.stat()
    except FileNotFoundError as error:
        raise DataError(file, "is gone", remedy="put it back, or correct the recipe") from error
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
