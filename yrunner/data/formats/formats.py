"""Turn rows into conversations: one small function per data format."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from yrunner.data.conversation import Conversation, FaultyRow, Message
from yrunner.data.dataset.row_report import Refusal
from yrunner.data.formats.columns import (
    SYSTEM_COLUMNS,
    check_characters,
    filled,
    is_absent,
    plainly_named,
    renamed,
    shown,
    system_of,
    text_of,
    type_name,
)
from yrunner.data.formats.meaning import (
    CHOSEN,
    COLUMNS,
    MARKS,
    REJECTED,
    WEIGHTS,
    check_context,
    check_marks,
    check_meaning,
    find_marks,
    find_preference,
    preference_remedy,
)
from yrunner.data.formats.turns import (
    TOOL_COLUMNS,
    Tools,
    check_turns,
    find_tools,
    read_history,
    read_turns,
)
from yrunner.data.readers.files import kind_of, notes_on, read_rows
from yrunner.data.readers.json import TURN_KEYS
from yrunner.data.readers.text import Advance, Damaged, FileRow
from yrunner.errors import DataError, Origin

RawRow = Mapping[str, Any]
Messages = tuple[Message, ...]

TURN_COLUMNS = ("conversations", "conversation", "messages", "prompt")
QUESTION_COLUMNS = ("instruction", "input", "question", "query", *TURN_COLUMNS)
"""Columns that `output` may answer; if all are empty, `output` is a plain document."""


def from_alpaca(row: RawRow) -> Messages:
    """`instruction`, `input`, `output`, and the optional `history`; BELLE has no `input`."""
    return _exchange(row, "instruction", alpaca_question(row), "output")


def alpaca_question(row: RawRow) -> str:
    """`instruction`, and `input` on the lines below it."""
    question = text_of(row, "instruction")
    if is_absent(row.get("input")):
        return question
    given = text_of(row, "input")
    return f"{question}\n{given}" if question else given


def from_sharegpt(row: RawRow) -> Messages:
    """`conversations`, as in ShareGPT, LLaMA-Factory and MiniMind; Firefly's `conversation`."""
    column = filled(row, ("conversations", "conversation"))
    messages = read_turns(row[column], column)
    check_turns(messages)
    return messages


def from_messages(row: RawRow) -> Messages:
    """OpenAI's form: a list of `role` and `content`."""
    messages = read_turns(row["messages"], "messages")
    check_turns(messages)
    return messages


def from_prompt_response(row: RawRow) -> Messages:
    """`prompt` with `response` or `completion`, each a text or a list of messages.

    As in TRL, only the response is trained on: replies inside the prompt are context.
    """
    prompt, answering = row["prompt"], filled(row, ("response", "completion"))
    if isinstance(prompt, str) and isinstance(row[answering], str):
        return _exchange(row, "prompt", prompt, answering)
    asked = as_turns(prompt, "prompt", "user")
    answered = as_turns(row[answering], answering, "assistant")
    context = [
        replace(message, learned=False) if message.role == "assistant" else message
        for message in asked
    ]
    messages = (*read_history(row.get("history")), *context, *answered)
    check_turns(messages)
    return messages


def from_question_answer(row: RawRow) -> Messages:
    """`question` or `query` with `answer` or `response`, and the optional `history`."""
    asking = filled(row, ("question", "query"))
    return _exchange(row, asking, text_of(row, asking), filled(row, ("answer", "response")))


def from_text(row: RawRow) -> Messages:
    """A plain document, whose tokens are all targets: `text`, or `output` without a question."""
    column = filled(row, ("text", "output"))
    if column == "output" and _asks(row):
        raise FaultyRow('has no "text", and "output" answers a question', "missing_field")
    text = text_of(row, column)
    if not text.strip():
        raise FaultyRow(f'"{column}" is empty', "empty")
    return (Message("text", text),)


@dataclass(frozen=True)
class Format:
    """How the rows of a format are detected and read."""

    read: Callable[[RawRow], Messages]
    needed: tuple[tuple[str, ...], ...]
    """Columns that a row must have, each with its synonyms; `auto` detects the format by them."""
    optional: tuple[str, ...] = (*SYSTEM_COLUMNS, *TOOL_COLUMNS)


WITH_HISTORY = ("history", *Format.optional)

FORMATS: dict[str, Format] = {
    "alpaca": Format(from_alpaca, (("instruction",), ("output",)), ("input", *WITH_HISTORY)),
    "sharegpt": Format(from_sharegpt, (("conversations", "conversation"),)),
    "messages": Format(from_messages, (("messages",),)),
    "prompt_response": Format(
        from_prompt_response, (("prompt",), ("response", "completion")), WITH_HISTORY
    ),
    "question_answer": Format(
        from_question_answer, (("question", "query"), ("answer", "response")), WITH_HISTORY
    ),
    "text": Format(from_text, (("text", "output"),), ()),
}

KNOWN = frozenset(
    [
        *(name for it in FORMATS.values() for names in it.needed for name in names),
        *(name for it in FORMATS.values() for name in it.optional),
        *COLUMNS,
    ]
)
"""Every column that is read or refused by its name."""


def read_row(row: Any, format_name: str, columns: Mapping[str, str]) -> tuple[Messages, Tools]:
    """The messages of a row, and the tools it describes. Raises `FaultyRow`.

    `columns` maps the format's column names to the file's.
    """
    if not isinstance(row, dict):
        raise FaultyRow(f"is {type_name(row)}, not an object with named fields", "not_an_object")
    data_format = FORMATS[format_name]
    row = _named(row, data_format, columns)
    for names in data_format.needed:
        if row.keys().isdisjoint(names):
            theirs = " or ".join(f'"{columns.get(name, name)}"' for name in names)
            raise FaultyRow(f"has no {theirs}", "missing_field")
    check_meaning(row, columns)
    messages = data_format.read(row)
    tools: Tools = ()
    if data_format.optional:
        check_context(row, known_columns(format_name), columns)
        messages = with_system(row, messages)
        tools = find_tools(row, TURN_COLUMNS)
    check_all_characters(messages)
    return messages, tools


def detect_format(rows: Sequence[Any], columns: Mapping[str, str]) -> str:
    """The one format that most rows match. Raises `FaultyRow` if none or several match.

    Most, not all: an invalid row at the top must not hide the format of the file.
    """
    named = [row for row in rows if isinstance(row, dict)]
    if not named:
        raise FaultyRow("has no row with named fields", "not_an_object")
    matching = [
        name
        for name, data_format in FORMATS.items()
        if sum(_matches(row, data_format, columns) for row in named) * 2 > len(named)
    ]
    found = ", ".join(sorted({shown(str(key)) for row in named for key in row})[:12])
    if not matching:
        raise FaultyRow(f"matches no known format; its columns are {found}", "missing_field")
    if len(matching) > 1:
        reason = f"matches {' and '.join(matching)}; its columns are {found}"
        raise FaultyRow(reason, "wrong_type")
    return matching[0]


def known_columns(format_name: str) -> tuple[str, ...]:
    """Every column that this format reads."""
    data_format = FORMATS[format_name]
    return (*[name for names in data_format.needed for name in names], *data_format.optional)


def _matches(row: RawRow, data_format: Format, columns: Mapping[str, str]) -> bool:
    row = _named(row, data_format, columns)
    if any(row.keys().isdisjoint(names) for names in data_format.needed):
        return False
    return data_format.read is not from_text or "text" in row or not _asks(row)


def _named(row: RawRow, data_format: Format, columns: Mapping[str, str]) -> RawRow:
    """The row with the column names of the format."""
    row = plainly_named(row, KNOWN, columns)
    if not columns:
        return row
    return renamed(row, columns, (*data_format.needed, TOOL_COLUMNS, SYSTEM_COLUMNS))


def _asks(row: RawRow) -> bool:
    return any(not is_absent(row.get(name)) for name in QUESTION_COLUMNS)


def _exchange(row: RawRow, asking: str, question: str, answering: str) -> Messages:
    """A question and its answer, after the `history` of the row."""
    answer = text_of(row, answering)
    if not question.strip():
        raise FaultyRow(f'"{asking}" is empty', "empty")
    if not answer.strip():
        raise FaultyRow(f'"{answering}" is empty, so there is nothing to train on', "empty")
    exchange = (Message("user", question), Message("assistant", answer))
    history = row.get("history")
    if is_absent(history):
        return exchange
    messages = (*read_history(history), *exchange)
    check_turns(messages)
    return messages


def as_turns(value: Any, column: str, role: Literal["user", "assistant"]) -> Messages:
    """A text, a list of messages, or one message as in LLaMA-Factory's pairs."""
    if isinstance(value, str):
        return (Message(role, value),)
    is_turn = isinstance(value, dict) and not value.keys().isdisjoint(("role", "from"))
    return read_turns([value] if is_turn else value, column)


def with_system(row: RawRow, messages: Messages) -> Messages:
    """The messages, with the row's system column in front."""
    system = system_of(row)
    if system is None:
        return messages
    if messages[0].role != "system":
        return (Message("system", system), *messages)
    if messages[0].content != system:
        column = next(name for name in SYSTEM_COLUMNS if row.get(name) == system)
        reason = f'has a "{column}" that differs from its system message; keep one of them'
        raise FaultyRow(reason, "wrong_type")
    return messages


def check_all_characters(messages: Messages) -> None:
    """Raise `FaultyRow` for an unpaired surrogate in a message."""
    if "".join([message.content for message in messages]).isascii():
        return
    for number, message in enumerate(messages, start=1):
        check_characters(f"message {number} ({message.role})", message.content)


ASKING = {
    "sharegpt": ("conversations", "conversation"),
    "messages": ("messages",),
    "alpaca": ("instruction",),
    "prompt_response": ("prompt",),
    "question_answer": ("question", "query"),
}
"""What the answers of a row answer, by the format; a pair of texts has it in its answers."""

SYNONYMS = (*ASKING.values(), CHOSEN, REJECTED, MARKS, TOOL_COLUMNS, SYSTEM_COLUMNS)


def under_our_names(row: RawRow, columns: Mapping[str, str]) -> RawRow:
    """The row under the names of the formats; OpenAI's `input` holds messages and tools."""
    row = plainly_named(row, KNOWN, columns)
    if columns:
        row = renamed(row, columns, SYNONYMS)
    asked = row.get("input")
    if isinstance(asked, Mapping) and "messages" in asked:
        own = {name: value for name, value in row.items() if name != "input"}
        return own | {name: asked[name] for name in ("messages", "tools") if name in asked}
    return row


ROWS_TO_DETECT = 100


@dataclass(frozen=True)
class Reading:
    """How the rows of a data file are read."""

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    document: Literal["line", "file"] = "line"
    """Whether each line of a txt file is a document, or the whole file."""


Row = TypeVar("Row")


@dataclass(frozen=True)
class ReadFile(Generic[Row]):
    """A data file of known format; iterating its rows reads the file, once."""

    format: str
    unread: tuple[str, ...]
    """Columns of its first rows that this format does not read."""
    notes: tuple[str, ...]
    """What is unusual about the file."""
    rows: Iterator[Row | Refusal]


def read_conversations(
    file: Path, reading: Reading = Reading(), advance: Advance | None = None
) -> ReadFile[Conversation]:
    """Open a data file; each row becomes a conversation or a refusal.

    Raises `DataError` if the file cannot be read.
    """
    rows = map(with_names, read_rows(file, document=reading.document, advance=advance))
    first = list(islice(rows, ROWS_TO_DETECT))
    if reading.format == "auto" or not first:
        check_any_readable(first, file)
    named = [
        plainly_named(row, KNOWN, reading.columns) for _, row in first if isinstance(row, Mapping)
    ]
    _check_preference(named, file, reading.columns)
    format_name = detect(first, file, reading) if reading.format == "auto" else reading.format
    check_columns(file, reading, format_name, known_columns(format_name))
    marks = find_marks(named, texts=format_name == "text")
    conversations = _conversations(chain(first, rows), format_name, reading.columns, marks)
    read = {reading.columns.get(name, name) for name in known_columns(format_name)}
    unread = {
        shown(str(key)) for row in named for key in row if key not in {*read, *marks, *WEIGHTS}
    }
    return ReadFile(format_name, tuple(sorted(unread)), tuple(notes_on(file)), conversations)


def with_names(row: FileRow) -> FileRow:
    """The row; a bare list of turns becomes one with the column `messages`."""
    origin, value = row
    is_turn = isinstance(value, list) and value and isinstance(value[0], dict)
    return (origin, {"messages": value}) if is_turn and TURN_KEYS & value[0].keys() else row


def _check_preference(rows: Sequence[RawRow], file: Path, columns: Mapping[str, str]) -> None:
    """Raise `DataError` if most rows hold better and worse answers, with a way to read them."""
    found = [(row, reason) for row in rows if (reason := find_preference(row, columns))]
    if len(found) * 2 > len(rows):
        row, reason = found[0]
        raise DataError(file, reason, remedy=preference_remedy(row))


def check_columns(file: Path, reading: Reading, format_name: str, known: Sequence[str]) -> None:
    """Raise `DataError` if `columns` of the recipe names a column that the format does not have."""
    unknown = [name for name in reading.columns if name not in known]
    if unknown:
        raise DataError(
            file,
            f'columns has "{unknown[0]}", but the format {format_name} has {", ".join(known)}',
            remedy="write columns as {format's name: file's name}",
        )


def check_any_readable(rows: Sequence[FileRow], file: Path) -> None:
    """Raise `DataError` if none of the first rows of a file can be read."""
    if not rows:
        raise DataError(file, "has no rows", remedy="remove it from the recipe")
    origin, first = rows[0]
    if isinstance(first, Damaged) and all(isinstance(row, Damaged) for _, row in rows):
        raise DataError(origin, str(first), remedy="no other row can be read either; fix the file")


def detect(rows: Sequence[FileRow], file: Path, reading: Reading) -> str:
    """The format of a file by its first rows. Raises `DataError` if none or several match."""
    try:
        return detect_format([row for _, row in rows], reading.columns)
    except FaultyRow as fault:
        remedy = (
            "set its format in the recipe, or map its columns, for example "
            "columns: {instruction: question, output: answer}"
        )
        if kind_of(file) in (".csv", ".tsv"):
            remedy += "; if its first line is a row, write a header above it"
        raise DataError(file, str(fault), remedy=remedy) from fault


def _conversations(
    rows: Iterator[FileRow], format_name: str, columns: Mapping[str, str], marks: Sequence[str]
) -> Iterator[Conversation | Refusal]:
    for origin, row in rows:
        yield _conversation(origin, row, format_name, columns, marks)


def _conversation(
    origin: Origin, row: Any, format_name: str, columns: Mapping[str, str], marks: Sequence[str]
) -> Conversation | Refusal:
    if isinstance(row, Damaged):
        return Refusal(origin, "unreadable", str(row))
    try:
        messages, tools = read_row(row, format_name, columns)
        check_marks(plainly_named(row, MARKS, columns), marks)
    except FaultyRow as fault:
        return Refusal(origin, fault.kind, str(fault))
    return Conversation(messages, origin, tools)
