"""Read text files, plain or gzipped, as UTF-8, and notice files that change while they are read.

`FileRow` is a row as its file holds it, before its format is known.
"""

import io
import zlib
from codecs import BOM_UTF8, getincrementaldecoder
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from gzip import BadGzipFile, GzipFile
from pathlib import Path
from typing import Any, TextIO

from yrunner.errors import DataError, Origin
from yrunner.text_files import looks_chinese

FileRow = tuple[Origin, Any]
"""Where a row is, and its value: a mapping if the file is valid, else anything or `Damaged`."""

Advance = Callable[[int], object]
"""Called with the number of bytes just read from disk; the calls add up to the file's size."""


class Damaged(str):
    """Why a row could not be read."""

    __slots__ = ()


BYTES_AT_ONCE = 1 << 20
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def is_gzipped(path: Path) -> bool:
    """Whether a file is gzip-compressed, by its suffix."""
    return path.suffix.lower() == ".gz"


@contextmanager
def open_text(
    path: Path, *, newline: str | None = "\n", advance: Advance | None = None
) -> Iterator[TextIO]:
    """Open a text file; it is decompressed and decoded while it is read, without its BOM.

    `newline` is that of `open`. By default only a line feed ends a line: a row may contain the
    other line separators of Unicode. Reading raises `DataError` for a file that is not UTF-8 or is
    a damaged gzip file.
    """
    try:
        # utf-8-sig skips the byte order mark that some editors write, and needs none.
        with (
            _open_bytes(path, advance) as content,
            io.TextIOWrapper(content, "utf-8-sig", newline=newline) as text,
        ):
            yield text
    except UnicodeDecodeError as error:
        raise _wrong_encoding(path) from error
    except (BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            path,
            f"damaged gzip file: {str(error).rstrip('.')}",
            remedy="download or compress it again",
        ) from error


class _CountedFile(io.FileIO):
    """Reports how many bytes are read from it."""

    def __init__(self, path: Path, advance: Advance | None) -> None:
        super().__init__(path)
        self._advance = advance

    def readinto(self, buffer: Any) -> int:
        num_bytes = super().readinto(buffer)
        if self._advance is not None:
            self._advance(num_bytes)
        return num_bytes


@contextmanager
def _open_bytes(path: Path, advance: Advance | None = None) -> Iterator[Any]:
    with io.BufferedReader(_CountedFile(path, advance), BYTES_AT_ONCE) as content:
        if not is_gzipped(path):
            yield content
        else:
            with GzipFile(fileobj=content) as decompressed:
                yield decompressed


def _wrong_encoding(path: Path) -> DataError:
    """Read the file again to locate the invalid byte: the stream kept no position."""
    line, position, value, start = _first_invalid_byte(path)
    remedy = "save the file as UTF-8"
    looks = "UTF-16" if start in UTF16_MARKS else "GB18030" if _is_chinese(path) else None
    if looks:
        remedy = f"it looks like {looks}; {remedy}, or run: iconv -f {looks} -t UTF-8"
    file = "decompressed file" if is_gzipped(path) else "file"
    return DataError(
        path,
        f"line {line}: byte {position} of the {file} (0x{value:02x}) is not UTF-8",
        remedy=remedy,
    )


def _is_chinese(path: Path) -> bool:
    """Whether the start of a file that is not UTF-8 is Chinese in GBK or GB18030."""
    with _open_bytes(path) as content:
        return looks_chinese(content.read(BYTES_AT_ONCE).removeprefix(BOM_UTF8))


def _first_invalid_byte(path: Path) -> tuple[int, int, int, bytes]:
    """Its line and position, counted from 1, its value, and the first two bytes of the file."""
    decoder = getincrementaldecoder("utf-8")()
    start = b""
    num_bytes = num_lines = 0
    with _open_bytes(path) as content:
        while True:
            chunk = content.read(BYTES_AT_ONCE)
            start = start or chunk[:2]
            num_bytes += len(chunk)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                # Its object may begin with the last bytes of the chunk before.
                position = num_bytes - len(error.object) + error.start
                line = num_lines + error.object.count(b"\n", 0, error.start) + 1
                return line, position + 1, error.object[error.start], start
            num_lines += chunk.count(b"\n")
            assert chunk, "the file was not UTF-8 a moment ago"


State = tuple[int, int, int, int]
"""Inode, size, and times of last change: together they differ after any change of content."""


def states_of(files: Iterable[Path]) -> dict[Path, State]:
    """The present state of each file. Raises `DataError` if one does not exist."""
    return {file: _state(file) for file in files}


def check_unchanged(states: Mapping[Path, State]) -> None:
    """Raise `DataError` if a file is no longer as `states_of` found it."""
    for file, state in states.items():
        if _state(file) != state:
            raise DataError(
                file,
                "changed while it was being read",
                remedy="run the command again once nothing writes to it",
            )


@contextmanager
def unchanged(
    states: Mapping[Path, State], undo: Callable[[], None] | None = None
) -> Iterator[None]:
    """`check_unchanged` after the block, also if it fails: the change may be the reason.

    `undo` removes what was made from the files.
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
        raise DataError(
            file, "no longer exists", remedy="restore it, or correct the recipe"
        ) from error
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
