"""Tools and the calls of them, brought into the form that chat templates read: OpenAI's."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from yrunner.data.columns import is_absent, type_name
from yrunner.data.conversation import FaultyRow

Tools = tuple[Mapping[str, Any], ...]
"""Each `{"type": "function", "function": {"name", "description", "parameters"}}`."""

Calls = tuple[Mapping[str, Any], ...]
"""Each `{"type": "function", "function": {"name", "arguments"}}`; arguments are an object."""


TOOL_COLUMNS = ("tools", "functions")


def find_tools(row: Mapping[str, Any], turn_columns: Sequence[str]) -> Tools:
    """The tools in a column of a row, or in its first turn, where MiniMind has them.

    Raises `FaultyRow` where they stand in two places, or `read_tools` does.
    """
    places = [row]
    for column in turn_columns:
        turns = row.get(column)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            places.append(turns[0])
    found = [
        place[name]
        for place in places
        for name in TOOL_COLUMNS
        if name in place and not is_absent(place[name])
    ]
    if len(found) > 1:
        raise FaultyRow("describes its tools in two places; keep one of them", "wrong_type")
    return read_tools(found[0]) if found else ()


def read_tools(value: Any) -> Tools:
    """The tools that a row describes: a list of them, or its JSON text as in LLaMA-Factory.

    Raises `FaultyRow` where it is neither, or a tool has no name.
    """
    tools = _plain(value, '"tools"')
    if not isinstance(tools, list):
        raise FaultyRow(f'"tools" is {type_name(tools)}, not a list of tools', "wrong_type")
    return tuple(
        _with_function(tool, f'"tools": tool {number}')
        for number, tool in enumerate(tools, start=1)
    )


def read_calls(value: Any, where: str) -> Calls:
    """One call or a list of calls, also as JSON text.

    The arguments, which OpenAI writes as JSON text, become an object: most chat templates write
    JSON of them, and of a text it would be the JSON of a JSON. `where` names the message. Raises
    `FaultyRow` where a call has no name, or its arguments are no object.
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
    """A tool or a call in OpenAI's form; LLaMA-Factory has only the function of each."""
    if not isinstance(value, dict):
        raise FaultyRow(f"{where} is {type_name(value)}, not an object", "wrong_type")
    wrapped = value if "function" in value else {"function": value}
    function = wrapped["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FaultyRow(f'{where} has no "name"', "missing_field")
    return {"type": "function", **wrapped}


def _plain(value: Any, what: str) -> Any:
    """The value that a JSON text holds, or the value itself without the nulls in its objects.

    Raises `FaultyRow` where JSON could not hold it: it has to be written as JSON for the model.
    """
    try:
        plain = json.loads(value) if isinstance(value, str) else _without_nulls(value)
        json.dumps(plain, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FaultyRow(f"{what} holds half of a character", "characters") from error
    # A date is a TypeError; values that nest too deeply are a RecursionError.
    except (ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise FaultyRow(f"{what} cannot be read as JSON: {reason}", "wrong_type") from error
    return plain


def _without_nulls(value: Any) -> Any:
    """A parquet file gives every object the keys of all its like, and null where there is none."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
