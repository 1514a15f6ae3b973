"""Turn rows into prompts that the model answers itself, with the columns that rewards read.

A final answer in the row is no part of its prompt; it becomes the column `answer`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from yrunner.data.conversation import Answers, Conversation, FaultyRow, Message
from yrunner.data.dataset.row_report import Refusal
from yrunner.data.formats.columns import (
    EVERY_COLUMN,
    Need,
    filled,
    is_absent,
    quoted,
    shown,
    text_of,
    type_name,
)
from yrunner.data.formats.formats import (
    ASKING,
    FORMATS,
    ROWS_TO_DETECT,
    TURN_COLUMNS,
    Messages,
    RawRow,
    ReadFile,
    Reading,
    alpaca_question,
    as_turns,
    check_all_characters,
    check_any_readable,
    check_columns,
    known_columns,
    under_our_names,
    with_names,
    with_system,
)
from yrunner.data.formats.meaning import check_context, check_plain_meaning
from yrunner.data.formats.turns import check_turns, find_tools, read_history, read_turns, with_turns
from yrunner.data.numbers import last_number
from yrunner.data.readers.files import notes_on, read_rows
from yrunner.data.readers.text import Advance, Damaged, FileRow
from yrunner.errors import DataError, Origin
from yrunner.text_files import schema_fault

ANSWER = "answer"
"""The column that a final answer becomes."""


def read_prompts(
    file: Path, reading: Reading, needs: Sequence[Need] = (), advance: Advance | None = None
) -> ReadFile[Answers]:
    """Open a data file; each row becomes a conversation that ends before its answer, or a refusal.

    Raises `DataError` if the file cannot be read, or if its first rows have no question, or lack a
    column that a reward needs.
    """
    rows = map(with_names, read_rows(file, document=reading.document, advance=advance))
    first = list(islice(rows, ROWS_TO_DETECT))
    check_any_readable(first, file)
    named = [(origin, _leniently(row, reading.columns)) for origin, row in first]
    format_name = reading.format
    if format_name == "auto":
        format_name = _detect(named, file)
    elif format_name == "text":
        raise DataError(
            file,
            "has plain texts (format: text), which ask nothing",
            remedy="name the column with the prompt, for example columns: {prompt: text}, "
            "and remove format",
        )
    known = (*known_columns(format_name), ANSWER)
    check_columns(file, reading, format_name, known)
    prompts = [
        (origin, _read_leniently(row, format_name, reading.columns, needs)) for origin, row in first
    ]
    _check_any_has([(origin, found) for origin, found in prompts if found is not None], needs)
    read = {reading.columns.get(name, name) for name in known} | {need.column for need in needs}
    unread = {shown(str(key)) for _, row in named for key in row if key not in read | {*known}}
    if EVERY_COLUMN in read:
        unread = set()
    found = _prompts(chain(first, rows), format_name, reading.columns, needs)
    return ReadFile(format_name, tuple(sorted(unread)), tuple(notes_on(file)), found)


def _leniently(row: Any, columns: Mapping[str, str]) -> RawRow:
    """The row under our names, to detect the format; empty if it cannot be read."""
    try:
        return under_our_names(with_turns(row), columns)
    except FaultyRow:
        return {}


def _read_leniently(
    row: Any, format_name: str, columns: Mapping[str, str], needs: Sequence[Need]
) -> RawRow | None:
    """The columns of a row, `answer` among them; None for a row without a prompt."""
    try:
        return _read(row, format_name, columns, needs)[2]
    except FaultyRow:
        return None


def _detect(rows: Sequence[tuple[Origin, RawRow]], file: Path) -> str:
    """The format whose question half of the rows have; a column `prompt` is always the prompt."""
    num_rows = max(1, sum(1 for _, row in rows if row))
    matching = [
        name
        for name, asking in ASKING.items()
        if sum(any(not is_absent(row.get(it)) for it in asking) for _, row in rows) * 2 >= num_rows
    ]
    if "prompt_response" in matching or len(matching) == 1:
        return "prompt_response" if "prompt_response" in matching else matching[0]
    columns = ", ".join(sorted({shown(str(key)) for _, row in rows for key in row})[:12])
    if matching:
        raise DataError(
            file,
            f"matches {' and '.join(matching)}; its columns are {columns}",
            remedy="set its format in the recipe",
        )
    raise DataError(
        file,
        f"has no prompt and no question; its columns are {columns or 'none'}",
        remedy="name the column that asks, for example columns: {prompt: problem}",
    )


def _check_any_has(rows: Sequence[tuple[Origin, RawRow]], needs: Sequence[Need]) -> None:
    """Raise `DataError` for a column that a reward needs and none of these rows has."""
    for need in needs:
        if need.kind == "optional" or not rows:
            continue
        if all(is_absent(row.get(need.column)) for _, row in rows):
            origin, row = rows[0]
            columns = ", ".join(sorted(shown(str(key)) for key in row)[:12])
            raise DataError(
                origin,
                f'has no "{need.column}", which the reward "{need.by}" needs, and no other of the '
                f"first rows has it; its columns are {columns}",
                remedy="add the column, or name another one in the reward",
            )


def _prompts(
    rows: Iterator[FileRow], format_name: str, columns: Mapping[str, str], needs: Sequence[Need]
) -> Iterator[Answers | Refusal]:
    for origin, row in rows:
        if isinstance(row, Damaged):
            yield Refusal(origin, "unreadable", str(row))
            continue
        try:
            messages, tools, known = _read(row, format_name, columns, needs)
            for need in needs:
                check_need(known, need)
        except FaultyRow as fault:
            yield Refusal(origin, fault.kind, str(fault))
            continue
        yield (Conversation(messages, origin, tools, columns=known),)


def _read(
    raw: Any, format_name: str, columns: Mapping[str, str], needs: Sequence[Need] = ()
) -> tuple[Messages, tuple[Mapping[str, Any], ...], RawRow]:
    """The prompt of a row, the tools it describes, and its columns. Raises `FaultyRow`."""
    row = under_our_names(with_turns(raw), columns)
    asking = ASKING[format_name]
    if row.keys().isdisjoint(asking):
        theirs = " or ".join(f'"{columns.get(name, name)}"' for name in asking)
        raise FaultyRow(f"has no {theirs}", "missing_field")
    # A weight that a reward compares with is that of an apple, not of the row.
    read = {need.column for need in needs}
    check_plain_meaning({name: value for name, value in row.items() if name not in read})
    check_context(row, known_columns(format_name), columns)
    messages, answer = _prompt_and_answer(row, format_name)
    tools = find_tools(row, TURN_COLUMNS)
    if not messages:
        raise FaultyRow("has only an answer, and no question", "roles")
    messages = with_system(row, messages)
    # Roles are in order if a reply can follow; it may not be the system message alone.
    check_turns((*messages, Message("assistant", "...")))
    check_all_characters(messages)
    known = dict(raw)
    if ANSWER in columns:
        known[ANSWER] = row.get(ANSWER)
    if is_absent(known.get(ANSWER)) and not is_absent(answer):
        known[ANSWER] = answer
    return messages, tools, known


def _prompt_and_answer(row: RawRow, format_name: str) -> tuple[Messages, Any]:
    """The turns before the final answer, and this answer; None if there is none."""
    column = filled(row, ASKING[format_name])
    answer: Any = None
    if format_name in ("sharegpt", "messages"):
        messages = read_turns(row[column], column)
    elif format_name == "prompt_response":
        messages = (*read_history(row.get("history")), *as_turns(row[column], column, "user"))
    else:
        question = alpaca_question(row) if format_name == "alpaca" else text_of(row, column)
        messages = (*read_history(row.get("history")), Message("user", question))
    if not any(message.content.strip() for message in messages):
        raise FaultyRow(f'"{column}" is empty', "empty")
    if messages[-1].role == "assistant":
        *before, reply = messages
        messages, answer = tuple(before), reply.content
    answers = [name for names in FORMATS[format_name].needed[1:] for name in names]
    given = [name for name in answers if not is_absent(row.get(name))]
    return messages, _text_of_reply(row[filled(row, given)]) if given else answer


def _text_of_reply(value: Any) -> Any:
    """The text of a reply that is written as messages; any other value as it is."""
    turns = value if isinstance(value, list) else [value]
    if turns and all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return read_turns(turns, ANSWER)[-1].content
    return value


def check_need(row: RawRow, need: Need) -> None:
    """Raise `FaultyRow` if a row lacks what a reward needs."""
    if need.kind == "optional":
        return
    value = row.get(need.column)
    if value is None or (need.kind != "value" and is_absent(value)):
        where = "is empty" if need.column in row else "is missing"
        reason = f'"{need.column}" {where}, which the reward "{need.by}" needs'
        raise FaultyRow(reason, "missing_field")
    complaint = _complaint(value, need.kind)
    if complaint is not None:
        reason = f'"{need.column}" {complaint}, and the reward "{need.by}" needs one'
        raise FaultyRow(reason, "wrong_type")


def _complaint(value: Any, kind: str) -> str | None:
    match kind:
        case "texts":
            if not all(map(_is_text, value if isinstance(value, list) else [value])):
                return f"is {type_name(value)}, not a text, a number, or a list of these"
        case "number":
            if isinstance(value, bool) or not _is_text(value) or last_number(value) is None:
                return f"is {quoted(value)}, which has no number"
        case "schema":
            return _schema_complaint(value)
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, str) and bool(value.strip()))


def _schema_complaint(value: Any) -> str | None:
    try:
        schema = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {shown(' '.join(str(error).split()))}"
    fault = schema_fault(schema)
    # Parts of the schema are quoted in it.
    parts = [] if fault is None else [shown(word) for word in fault.split()[:20]]
    return None if fault is None else f"is not a JSON Schema ({' '.join(parts)})"
