"""Turn a row into a conversation: one small function for each format people keep their data in."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, get_args

from yrunner.data.conversation import FaultyRow, Message, Role

FORMAT_KEYS: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "messages": ("messages",),
    "text": ("text",),
}
"""The columns that a row of each format must have; `auto` tells the formats apart by them."""

OPTIONAL_KEYS: dict[str, tuple[str, ...]] = {"alpaca": ("input", "system", "history")}

CHAT_ROLES = tuple(role for role in get_args(Role) if role != "text")

UNREAD_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""What a message may carry beside its content and we cannot render; never left out quietly."""

SHOWN_CHARACTERS = 40


def from_alpaca(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """`instruction`, `input`, `output`, and the optional `system` and `history` of pairs."""
    messages: list[Message] = []
    if row.get("system"):
        messages.append(Message("system", _text(row, "system")))
    for pair in _history(row):
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    question = _text(row, "instruction")
    if row.get("input"):
        question = f"{question}\n{_text(row, 'input')}"
    if not question.strip():
        raise FaultyRow('"instruction" is empty')
    answer = _text(row, "output")
    if not answer.strip():
        raise FaultyRow('"output" is empty, there is nothing to learn')
    return (*messages, Message("user", question), Message("assistant", answer))


def from_messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """OpenAI's form: a list of `role` and `content`."""
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise FaultyRow('"messages" is not a list of messages')
    messages = tuple(_message(turn, number) for number, turn in enumerate(turns, start=1))
    _check_order([message.role for message in messages])
    return messages


def from_text(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """A plain document; every token of it is learned."""
    text = _text(row, "text")
    if not text.strip():
        raise FaultyRow('"text" is empty')
    return (Message("text", text),)


FORMATS: dict[str, Callable[[Mapping[str, Any]], tuple[Message, ...]]] = {
    "alpaca": from_alpaca,
    "messages": from_messages,
    "text": from_text,
}


def read_row(row: Any, format_name: str, columns: Mapping[str, str]) -> tuple[Message, ...]:
    """Read one row; `columns` gives this file's names for the format's. Raises `FaultyRow`."""
    if not isinstance(row, Mapping):
        raise FaultyRow(f"is {_kind(row)}, not an object with named fields")
    renamed = rename(row, columns)
    for key in FORMAT_KEYS[format_name]:
        if key not in renamed:
            raise FaultyRow(f'has no "{columns.get(key, key)}"')
    messages = FORMATS[format_name](renamed)
    _check_characters(messages)
    return messages


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under the format's names: `columns` maps the format's name to the file's.

    A name that is mapped never falls back to the file's column of that very name.
    """
    mapped = {*columns, *columns.values()}
    own = {key: value for key, value in row.items() if key not in mapped}
    return own | {name: row[there] for name, there in columns.items() if there in row}


def detect_format(rows: Sequence[Any], columns: Mapping[str, str]) -> str:
    """The one format that most rows with named fields fit. Raises `FaultyRow` when none or two do.

    Most and not all: a faulty row in front must not hide what the file is.
    """
    named = [rename(row, columns) for row in rows if isinstance(row, Mapping)]
    if not named:
        raise FaultyRow("holds no row with named fields")
    fitting = [
        name
        for name, keys in FORMAT_KEYS.items()
        if sum(all(key in row for key in keys) for row in named) * 2 > len(named)
    ]
    found = ", ".join(sorted({_shown(str(key)) for row in named for key in row})[:12])
    if not fitting:
        raise FaultyRow(f"fits no format that is known; its columns are {found}")
    if len(fitting) > 1:
        raise FaultyRow(f"fits {' and '.join(fitting)}; its columns are {found}")
    return fitting[0]


def known_columns(format_name: str) -> tuple[str, ...]:
    """Every column that is read of a row of this format."""
    return FORMAT_KEYS[format_name] + OPTIONAL_KEYS.get(format_name, ())


def _kind(value: Any) -> str:
    names = {str: "text", list: "a list", dict: "an object", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _shown(text: str) -> str:
    """A text of the user's, short and printable enough for a message."""
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]}..."
    return text.encode("utf-8", "backslashreplace").decode()


def _check_characters(messages: Sequence[Message]) -> None:
    """Refuse halves of surrogate pairs: JSON can hold them, and no tokenizer or file does."""
    for number, message in enumerate(messages, start=1):
        try:
            message.content.encode()
        except UnicodeEncodeError as error:
            half = _shown(message.content[error.start])
            raise FaultyRow(
                f"message {number} ({message.role}): character {error.start + 1} is {half}, half "
                "of a character that was cut in two"
            ) from error


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise FaultyRow(f'"{key}" is {_kind(value)}, not text')
    return value


def _history(row: Mapping[str, Any]) -> list[list[str]]:
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise FaultyRow('"history" is not a list of [question, answer] pairs')
    return pairs


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and [type(part) for part in pair] == [str, str]


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
        raise FaultyRow(f'message {number} has no "role" and "content"')
    role, content = turn["role"], turn["content"]
    if role not in CHAT_ROLES:
        name = f'"{_shown(role)}"' if isinstance(role, str) else _kind(role)
        raise FaultyRow(f"message {number} has role {name}, known are {', '.join(CHAT_ROLES)}")
    for key in UNREAD_KEYS:
        if turn.get(key):
            raise FaultyRow(f'message {number} has "{key}", which cannot be learned from yet')
    if not isinstance(content, str):
        raise FaultyRow(f"message {number}: content is {_kind(content)}, not text")
    return Message(role, content)


def _check_order(roles: list[Role]) -> None:
    if "assistant" not in roles:
        raise FaultyRow("has no assistant message, there is nothing to learn")
    if "system" in roles[1:]:
        number = roles.index("system", 1) + 1
        raise FaultyRow(f"message {number} is a system message, only the first can be one")
    turns = roles[1:] if roles[0] == "system" else roles
    if turns[0] != "user":
        raise FaultyRow(f"the conversation begins with {turns[0]}, not with user")
    for before, after in pairwise(turns):
        if before == after and before in ("user", "assistant"):
            raise FaultyRow(f"two {before} messages follow each other")
    if turns[-1] != "assistant":
        raise FaultyRow(f"the conversation ends with {turns[-1]}, not with assistant")
