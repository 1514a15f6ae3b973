"""Read files below a folder that may come from somebody else, and nothing outside of it."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

LARGEST = 64 * 2**20
"""Bytes of the largest file that is read as a whole."""


def is_inside(path: Path, root: Path) -> bool:
    """Whether a path exists and, with all links followed, lies below `root`, itself resolved."""
    try:
        return path.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError, ValueError):
        return False


def open_inside(path: Path, root: Path) -> BinaryIO:
    """Open a regular file below `root`.

    Raises `FileNotFoundError` for anything else, such as a link to the outside or a pipe, which
    would wait for a writer.
    """
    if not is_inside(path, root):
        raise FileNotFoundError(path)
    file = open(path.resolve(), "rb", opener=_without_waiting)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FileNotFoundError(path)
    return file


def read_inside(path: Path, root: Path, largest: int = LARGEST) -> bytes:
    """The content of a regular file below `root`.

    Raises `FileNotFoundError` as `open_inside` does, and for a file of more than `largest` bytes.
    """
    with open_inside(path, root) as file:
        if os.fstat(file.fileno()).st_size > largest:
            raise FileNotFoundError(path)
        return file.read(largest)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)
