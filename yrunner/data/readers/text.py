"""A row as it stands in a data file, before anybody asks what it means.

Open a text file as a stream, plain or packed by gzip, and say which byte is not UTF-8.

A data file must be the same from its first reading to its last, or it is said that it is not.
"""

import io
import zlib
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from gzip import BadGzipFile, GzipFile
from pathlib import Path
from typing import Any, TextIO

from yrunner.errors import DataError, Origin

FileRow = tuple[Origin, Any]
"""A row as it stands in the file (a mapping, where the file is sound), and its place."""

Advance = Callable[[int], object]
"""Is told the number of bytes of the file, as it lies on the disk, that were read just now."""


class Damaged(str):
    """The reason why a row could not be read."""

    __slots__ = ()


BYTES_AT_ONCE = 1 << 20
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def is_packed(path: Path) -> bool:
    """Whether a file is packed by gzip, by its ending."""
    return path.suffix.lower() == ".gz"


@contextmanager
def open_text(
    path: Path, *, newline: str | None = "\n", advance: Advance | None = None
) -> Iterator[TextIO]:
    """The text of a file, unpacked and decoded as it is read; a byte order mark is left out.

    `newline` is that of `open`: by default only a line feed ends a line, because Unicode's other
    line ends may stand inside a row. Reading raises `DataError` where the file is not UTF-8, or is
    packed and not whole.
    """
    try:
        # utf-8-sig also reads files without the byte order mark that some editors put in front.
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
            f"not a whole gzip file: {str(error).rstrip('.')}",
            remedy="download it or pack it anew",
        ) from error


class _CountedFile(io.FileIO):
    """A file that tells how many of its bytes are read."""

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
        if not is_packed(path):
            yield content
        else:
            with GzipFile(fileobj=content) as unpacked:
                yield unpacked


def _wrong_encoding(path: Path) -> DataError:
    """Read the file once more for the place of the byte, which the stream did not keep."""
    line, place, value, start = _first_wrong_byte(path)
    remedy = "save the file as UTF-8"
    if start in UTF16_MARKS:
        remedy = f"it begins as UTF-16 does; {remedy}, or: iconv -f UTF-16 -t UTF-8"
    file = "unpacked file" if is_packed(path) else "file"
    return DataError(
        path,
        f"line {line}: byte {place} of the {file} (0x{value:02x}) is not UTF-8",
        remedy=remedy,
    )


def _first_wrong_byte(path: Path) -> tuple[int, int, int, bytes]:
    """Its line and place, counted from 1, its value, and the first two bytes of the file."""
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
                # Its object begins with what the chunk before held of a character cut in two.
                place = num_bytes - len(error.object) + error.start
                line = num_lines + error.object.count(b"\n", 0, error.start) + 1
                return line, place + 1, error.object[error.start], start
            num_lines += chunk.count(b"\n")
            assert chunk, "a file that was not UTF-8 a moment ago"


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
