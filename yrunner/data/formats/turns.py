"""Read turns (ShareGPT's `from` and `value`, OpenAI's `role` and `content`) and tool calls."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from yrunner.data.conversation import FaultyRow, Message, Role
from yrunner.data.formats.columns import check_characters, is_absent, quoted, shown, type_name
from yrunner.data.formats.meaning import MEDIA

Tools = tuple[Mapping[str, Any], ...]
"""Each `{"type": "function", "function": {"name", "description", "parameters"}}`."""

Calls = tuple[Mapping[str, Any], ...]
"""Each `{"type": "function", "function": {"name", "arguments"}}`; arguments are an object."""


TOOL_COLUMNS = ("tools", "functions")


def find_tools(row: Mapping[str, Any], turn_columns: Sequence[str]) -> Tools:
    """The tools in a column of a row, or in its first turn (MiniMind).

    Raises `FaultyRow` if the row has tools twice, or `read_tools` does.
    """
    holders = [row]
    for column in turn_columns:
        turns = row.get(column)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            holders.append(turns[0])
    found = [
        holder[name]
        for holder in holders
        for name in TOOL_COLUMNS
        if name in holder and not is_absent(holder[name])
    ]
    if len(found) > 1:
        raise FaultyRow("describes its tools twice; keep one of them", "wrong_type")
    return read_tools(found[0]) if found else ()


def read_tools(value: Any) -> Tools:
    """The tools of a row: a list, or a JSON text of one as in LLaMA-Factory.

    Raises `FaultyRow` for anything else, or a tool without a name.
    """
    tools = _plain(value, '"tools"')
    if not isinstance(tools, list):
        raise FaultyRow(f'"tools" is {type_name(tools)}, not a list of tools', "wrong_type")
    return tuple(
        _with_function(tool, f'"tools": tool {number}')
        for number, tool in enumerate(tools, start=1)
    )


def read_calls(value: Any, where: str) -> Calls:
    """One call or a list of calls, possibly as JSON text; `where` names the message.

    Arguments, JSON text in OpenAI's form, become an object: most chat templates write them as JSON,
    which would quote a text again. Raises `FaultyRow` if a call has no name, or its arguments are
    not an object.
    """
    calls = _plain(value, f"{where}: the tool call")
    if not isinstance(calls, list):
        calls = [calls]
    return tuple(
        _read_call(call, f"{where}: tool call {number}")
        for number, call in enumerate(calls, start=1)
    )


def _read_call(value: Any, where: str) -> Mapping[str, Any]:
    call = _with_function(value, where)
    function = call["function"]
    arguments = function.get("arguments")
    arguments = {} if arguments in (None, "") else _plain(arguments, f'{where}: "arguments"')
    if not isinstance(arguments, dict):
        reason = f'{where}: "arguments" is {type_name(arguments)}, not an object'
        raise FaultyRow(reason, "wrong_type")
    return {**call, "function": {**function, "arguments": arguments}}


def _with_function(value: Any, where: str) -> Mapping[str, Any]:
    """A tool or a call in OpenAI's form; LLaMA-Factory writes only its function."""
    if not isinstance(value, dict):
        raise FaultyRow(f"{where} is {type_name(value)}, not an object", "wrong_type")
    wrapped = value if "function" in value else {"function": value}
    function = wrapped["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FaultyRow(f'{where} has no "name"', "missing_field")
    return {"type": "function", **wrapped}


def _plain(value: Any, what: str) -> Any:
    """The value of a JSON text, or the given value without nulls in its objects.

    Raises `FaultyRow` if it cannot be written as JSON, as the chat template will do.
    """
    try:
        plain = json.loads(value) if isinstance(value, str) else _without_nulls(value)
        json.dumps(plain, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FaultyRow(f"{what} has an unpaired surrogate", "characters") from error
    # TypeError: a date, for example. RecursionError: nested too deeply.
    except (ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise FaultyRow(f"{what} is not valid JSON: {reason}", "wrong_type") from error
    return plain


def _without_nulls(value: Any) -> Any:
    """Parquet gives every object the keys of all others in its column, null where it has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython"), "tool"),
    "function_call": "assistant",
}
"""Roles by every name found in data files, in lower case."""

NEXT_ROLES: dict[Role, tuple[Role, ...]] = {
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}

PLAIN_KEYS = frozenset({"role", "content", "from", "value"})

TURNS_AS_TEXT = re.compile(r"""\s*(?:\[\s*)?\{\s*["'](?:role|content|from|value)["']\s*:""")
"""How a cell of a table begins that holds messages, as JSON or as Python writes them."""

PAIR_KEYS = ("human", "assistant")
"""Keys of a turn in Firefly, which holds a question and its answer."""

THINKING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "tool_plan")
"""Names that servers and chat templates give to the thinking before a reply."""

CALL_KEYS = ("tool_calls", "function_call")
CHOICE_KEYS = (
    "train", "training", "trainable", "train_on_turn", "learn", "loss", "weight", "loss_weight",
    "loss_scale", "loss_mask",
)  # fmt: skip
"""Whether a reply is trained on: 1 or true for yes, as in Axolotl, ms-swift, verl and OpenAI."""

UNREAD_KEYS = ("train_detail", "mask", "masked", "refusal", *MEDIA)
"""Keys that would change the example: a row with one is refused, never read without it."""

TEXT_PARTS = (None, "text", "input_text", "output_text")
"""Types of content parts with a text, in OpenAI's APIs; other types have more than a text."""


def read_turns(turns: Any, column: str) -> tuple[Message, ...]:
    """The messages of a list of turns in `column`. Raises `FaultyRow`.

    The order of roles is not checked: the list may be a part of a conversation.
    """
    if not isinstance(turns, list):
        reason = f'"{column}" is {type_name(turns)}, not a list of messages'
        raise FaultyRow(reason, "wrong_type")
    if not turns:
        raise FaultyRow(f'"{column}" has no messages', "empty")
    if isinstance(turns[0], dict) and turns[0].keys() >= set(PAIR_KEYS):
        turns = _split_pairs(turns)
    return tuple([_read_turn(turn, number) for number, turn in enumerate(turns, start=1)])


def read_history(history: Any) -> tuple[Message, ...]:
    """Earlier turns, if any: [question, answer] pairs or messages. Raises `FaultyRow`."""
    if is_absent(history):
        return ()
    if isinstance(history, list) and isinstance(history[0], dict):
        return read_turns(history, "history")
    if not isinstance(history, list) or not all(_is_pair(pair) for pair in history):
        reason = '"history" is not a list of [question, answer] pairs or messages'
        raise FaultyRow(reason, "wrong_type")
    return tuple(
        message
        for question, answer in history
        for message in (Message("user", question), Message("assistant", answer))
    )


def with_turns(row: Any) -> Mapping[str, Any]:
    """The row; a cell that holds turns as JSON becomes a list of them. Raises `FaultyRow`."""
    if not isinstance(row, Mapping):
        raise FaultyRow(f"is {type_name(row)}, not an object with named fields", "not_an_object")
    texts = [
        name
        for name, value in row.items()
        if isinstance(value, str) and TURNS_AS_TEXT.match(value) is not None
    ]
    if not texts:
        return row
    return {**row, **{name: _parsed(row[name], name) for name in texts}}


def _parsed(text: str, column: str) -> Any:
    """The turns that a text holds; the text itself if it is another JSON value, as answers may be.

    Raises `FaultyRow` for turns as Python writes them.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("[") and all(f"'{key}'" in text for key in ("role", "content")):
            reason = f'"{shown(column)}" holds messages that are not valid JSON'
            raise FaultyRow(reason, "wrong_type") from error
        return text
    turns = value if isinstance(value, list) else [value]
    return value if any(map(_is_turn, turns)) else text


def _is_turn(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys().isdisjoint(("content", "value", "tool_calls")):
        return False
    speaker = value.get("role", value.get("from"))
    return isinstance(speaker, str) and speaker.lower() in ROLES


def check_turns(messages: Sequence[Message]) -> None:
    """Raise `FaultyRow` if roles are out of order, or there is nothing to train on.

    The last question and the last reply must not be empty; earlier ones are context and may be.
    """
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise FaultyRow("has no assistant message, so there is nothing to train on", "roles")
    if "system" in roles[1:]:
        number = roles.index("system", 1) + 1
        reason = f"message {number} is a system message; only the first message can be one"
        raise FaultyRow(reason, "roles")
    opening = 1 if roles[0] == "system" else 0
    if roles[opening] != "user":
        raise FaultyRow(f"the conversation starts with {roles[opening]}, not user", "roles")
    for number, (before, role) in enumerate(pairwise(roles[opening:]), start=opening + 2):
        if role not in NEXT_ROLES[before]:
            reason = f"message {number} ({role}) cannot follow a message with role {before}"
            raise FaultyRow(reason, "roles")
    if roles[-1] != "assistant":
        raise FaultyRow(f"the conversation ends with {roles[-1]}, not assistant", "roles")
    _check_last_words(messages)


def _check_last_words(messages: Sequence[Message]) -> None:
    number, question = next(
        (number, message)
        for number, message in reversed([*enumerate(messages, start=1)])
        if message.role == "user"
    )
    if _is_blank(question.content):
        raise FaultyRow(f"message {number} (user), the last question, is empty", "empty")
    reply = messages[-1]
    if reply.learned and not reply.tool_calls and _is_blank(reply.content):
        reason = f"message {len(messages)} (assistant), the last reply, is empty"
        raise FaultyRow(reason, "empty")
    if not any(message.learned for message in messages if message.role == "assistant"):
        reason = "every reply is excluded, by train: false, weight: 0 or the like"
        raise FaultyRow(reason, "no_targets")


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and [type(part) for part in pair] == [str, str]


def _split_pairs(turns: Sequence[Any]) -> list[Any]:
    return [
        part
        for turn in turns
        for part in (
            [{"role": speaker, "content": turn.get(speaker)} for speaker in PAIR_KEYS]
            if isinstance(turn, dict)
            else [turn]
        )
    ]


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _read_turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        reason = f"message {number} is {type_name(turn)}, not an object with role and content"
        raise FaultyRow(reason, "wrong_type")
    speaker = _either(turn, "role", "from", number)
    content = _either(turn, "content", "value", number)
    if speaker is None:
        raise FaultyRow(f'message {number} has no "role" and no "from"', "missing_field")
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        reason = f"message {number} has role {quoted(speaker)}; use one of {', '.join(ROLES)}"
        raise FaultyRow(reason, "roles")
    if speaker.lower() == "function_call":
        content, turn = _as_calling(turn, content, number)
    if isinstance(content, str) and turn.keys() <= PLAIN_KEYS:
        return Message(role, content)
    return _read_rich_turn(turn, role, content, f"message {number} ({role})")


def _either(turn: Mapping[str, Any], name: str, other: str, number: int) -> Any:
    value, second = turn.get(name), turn.get(other)
    if value is None:
        return second
    if second is not None:
        raise FaultyRow(f'message {number} has both "{name}" and "{other}"', "wrong_type")
    return value


def _as_calling(turn: Mapping[str, Any], value: Any, number: int) -> tuple[str, Mapping[str, Any]]:
    """The text of LLaMA-Factory's `function_call` turn, and the turn with its calls.

    Its value holds the calls as JSON, possibly after a thinking block.
    """
    thought = ""
    if isinstance(value, str) and value.lstrip().startswith("<think>"):
        thought, mark, value = value.partition("</think>")
        thought += mark
    if is_absent(value):
        raise FaultyRow(f"message {number} (function_call) has no call", "empty")
    return thought, {**turn, "tool_calls": value}


def _read_rich_turn(turn: Mapping[str, Any], role: Role, content: Any, where: str) -> Message:
    """A turn with more keys than a role and a text."""
    unread = UNREAD_KEYS if role == "system" else UNREAD_KEYS + TOOL_COLUMNS
    for key in unread if role == "assistant" else unread + CALL_KEYS + THINKING_KEYS:
        if not is_absent(turn.get(key)):
            raise FaultyRow(f'{where} has "{key}", which is not supported', "wrong_type")
    calls = _read_calls(turn, where)
    text = "" if content is None and calls else _join_parts(content, where)
    thinking = _read_thinking(turn, text, where)
    learned = _read_choice(turn, role, where)
    extras = _read_extras(turn, where) if role == "tool" else None
    return Message(role, thinking + text, learned, calls, extras)


def _read_calls(turn: Mapping[str, Any], where: str) -> Calls:
    filled = [key for key in CALL_KEYS if not is_absent(turn.get(key))]
    if len(filled) > 1:
        raise FaultyRow(f"{where} has both {' and '.join(filled)}", "wrong_type")
    return read_calls(turn[filled[0]], where) if filled else ()


def _join_parts(content: Any, where: str) -> str:
    """The text of `content`, which is a text or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise FaultyRow(f"{where}: content is {type_name(content)}, not text", "wrong_type")
    return "".join([_text_of_part(part, where) for part in content])


def _text_of_part(part: Any, where: str) -> str:
    """The text of a content part: itself, or its `text`, `value` or `content`."""
    if isinstance(part, str):
        return part
    fields = part if isinstance(part, dict) else {"type": part}
    kind = fields.get("type")
    texts = [fields[key] for key in ("text", "value", "content") if fields.get(key) is not None]
    if kind not in TEXT_PARTS or len(texts) != 1 or not isinstance(texts[0], str):
        raise FaultyRow(f"{where}: a content part ({quoted(kind)}) is not text", "wrong_type")
    return texts[0]


def _read_thinking(turn: Mapping[str, Any], text: str, where: str) -> str:
    """The thinking of a turn, as a block that opens its reply.

    From there it goes under the key that the chat template reads; templates that read none find it
    in the text, or show it. Line ends around the thinking are not part of it.
    """
    given = {key: turn[key] for key in THINKING_KEYS if not is_absent(turn.get(key))}
    for key, value in given.items():
        if not isinstance(value, str):
            raise FaultyRow(f'{where}: "{key}" is {type_name(value)}, not text', "wrong_type")
    thoughts = {value.strip("\n") for value in given.values() if value.strip()}
    if not thoughts:
        return ""
    if len(thoughts) > 1:
        raise FaultyRow(f"{where} has different texts in {' and '.join(given)}", "wrong_type")
    (thought,) = thoughts
    if "</think>" in thought + text:
        reason = f'{where} has "{next(iter(given))}", and </think> in its text'
        raise FaultyRow(reason, "wrong_type")
    return f"<think>\n{thought}\n</think>\n\n"


def _read_choice(turn: Mapping[str, Any], role: Role, where: str) -> bool:
    """Whether a reply is trained on; True for other turns. Raises `FaultyRow` if unclear."""
    choices = {key: turn[key] for key in CHOICE_KEYS if turn.get(key) is not None}
    for key, value in choices.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            given = shown(str(value)) if isinstance(value, (int, float)) else quoted(value)
            reason = f"{where}: {key} is {given}, not 0 or 1 (false or true)"
            if isinstance(value, float):
                reason += "; a reply is learned in full or not at all"
            raise FaultyRow(reason, "wrong_type")
    if len({bool(value) for value in choices.values()}) > 1:
        raise FaultyRow(f"{where}: {' and '.join(choices)} contradict each other", "wrong_type")
    if role != "assistant" and any(choices.values()):
        reason = f"{where}: has {next(iter(choices))}, but only replies can be trained on"
        raise FaultyRow(reason, "roles")
    return role != "assistant" or all(choices.values())


def _read_extras(turn: Mapping[str, Any], where: str) -> Mapping[str, str] | None:
    """The tool or call that a result belongs to."""
    extras = {key: turn[key] for key in ("name", "tool_call_id") if not is_absent(turn.get(key))}
    for key, value in extras.items():
        if not isinstance(value, str):
            raise FaultyRow(f'{where}: "{key}" is {type_name(value)}, not text', "wrong_type")
        check_characters(f'{where}: "{key}"', value)
    return extras or None
