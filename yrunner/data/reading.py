"""From the rows of a data file to conversations, in the format that the file is found to have."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from yrunner.data.conversation import Conversation, FaultyRow
from yrunner.data.files import read_rows
from yrunner.data.formats import detect_format, known_columns, read_row
from yrunner.data.refusals import Refusal
from yrunner.data.rows import Advance, Damaged, Row
from yrunner.errors import DataError, Origin

ROWS_TO_DETECT = 100


@dataclass(frozen=True)
class Reading:
    """How the rows of a data file are read."""

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    document: Literal["line", "file"] = "line"
    """What is one document in a txt file."""


@dataclass(frozen=True)
class ReadFile:
    """A data file whose format is known; its rows are read as they are asked for, once."""

    format: str
    unread: tuple[str, ...]
    """Columns of its first rows that say nothing in this format."""
    rows: Iterator[Conversation | Refusal]


def read_conversations(
    file: Path, reading: Reading = Reading(), advance: Advance | None = None
) -> ReadFile:
    """Open a data file; each of its rows comes as a conversation or as a refusal.

    `advance` is told of the bytes that were read. Raises `DataError` where the file cannot be read.
    """
    rows = read_rows(file, document=reading.document, advance=advance)
    first = list(islice(rows, ROWS_TO_DETECT))
    if not first:
        raise DataError(file, "holds no rows", remedy="remove it from the recipe")
    format_name = _format_of(first, file, reading)
    conversations = _conversations(chain(first, rows), format_name, reading.columns)
    return ReadFile(format_name, _unread(first, format_name, reading.columns), conversations)


def _unread(rows: Sequence[Row], format_name: str, columns: Mapping[str, str]) -> tuple[str, ...]:
    named = [row for _, row in rows if isinstance(row, Mapping)]
    read = {columns.get(name, name) for name in known_columns(format_name)}
    return tuple(sorted({str(key) for row in named for key in row if key not in read}))


def _format_of(rows: Sequence[Row], file: Path, reading: Reading) -> str:
    """The format of a file. Raises `DataError` where none fits, or not with these columns."""
    format_name = _detect(rows, file, reading) if reading.format == "auto" else reading.format
    known = known_columns(format_name)
    unknown = [name for name in reading.columns if name not in known]
    if unknown:
        raise DataError(
            file,
            f'columns has "{unknown[0]}", but the format {format_name} has {", ".join(known)}',
            remedy="write columns as the format's name: the file's name",
        )
    return format_name


def _detect(rows: Sequence[Row], file: Path, reading: Reading) -> str:
    origin, first = rows[0]
    if isinstance(first, Damaged) and all(isinstance(row, Damaged) for _, row in rows):
        raise DataError(
            origin, str(first), remedy="no other row of the file can be read either; mend it"
        )
    try:
        return detect_format([row for _, row in rows], reading.columns)
    except FaultyRow as fault:
        raise DataError(
            file,
            str(fault),
            remedy="set its format in the recipe, or name its columns as in "
            "columns: {instruction: question, output: answer}",
        ) from fault


def _conversations(
    rows: Iterator[Row], format_name: str, columns: Mapping[str, str]
) -> Iterator[Conversation | Refusal]:
    for origin, row in rows:
        yield _conversation(origin, row, format_name, columns)


def _conversation(
    origin: Origin, row: Any, format_name: str, columns: Mapping[str, str]
) -> Conversation | Refusal:
    if isinstance(row, Damaged):
        return Refusal(origin, "unreadable", str(row))
    try:
        messages, tools = read_row(row, format_name, columns)
    except FaultyRow as fault:
        return Refusal(origin, fault.kind, str(fault))
    return Conversation(messages, origin, tools)
