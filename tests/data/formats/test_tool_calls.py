"""Tools and calls come out in one form, however the data write them."""

import json

import pytest

from yrunner.data.conversation import FaultyRow
from yrunner.data.formats.turns import find_tools, read_calls, read_tools

FUNCTION = {"name": "tide", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
ARGUMENTS = {"town": "雾港", "days": [1, None]}
CALL = {"type": "function", "function": {"name": "tide", "arguments": ARGUMENTS}}


def fault_of(read, *arguments):
    with pytest.raises(FaultyRow) as refused:
        read(*arguments)
    assert "\n" not in str(refused.value)
    return refused.value.kind, str(refused.value)


@pytest.mark.parametrize("tool", [TOOL, FUNCTION])
@pytest.mark.parametrize("written", [list, json.dumps])
def test_tools_are_read_as_a_list_or_as_text(tool, written):
    assert read_tools(written([tool, tool])) == (TOOL, TOOL)


def test_tools_stand_in_a_column_or_in_the_first_turn():
    turns = [{"role": "system", "content": "", "tools": json.dumps([TOOL])}]
    for row in ({"tools": [TOOL]}, {"functions": [FUNCTION]}, {"turns": turns, "tools": ""}):
        assert find_tools(row, ("turns",)) == (TOOL,)
    for row in ({}, {"tools": None}, {"tools": "[]"}, {"turns": []}, {"turns": "q"}):
        assert find_tools(row, ("turns",)) == ()
    reason = "describes its tools twice; keep one of them"
    assert fault_of(find_tools, {"turns": turns, "tools": [TOOL]}, ["turns"])[1] == reason


@pytest.mark.parametrize(
    "value",
    [
        CALL,
        [CALL],
        CALL["function"],
        json.dumps(CALL),
        json.dumps([CALL["function"]]),
        {"name": "tide", "arguments": json.dumps(ARGUMENTS)},
    ],
)
def test_calls_are_read_in_every_form_with_an_object_of_arguments(value):
    assert read_calls(value, "message 2") == (CALL,)


@pytest.mark.parametrize("nothing", [{}, {"arguments": None}, {"arguments": ""}])
def test_a_call_without_arguments_has_none(nothing):
    (call,) = read_calls({"id": "c1", "function": {"name": "tide", **nothing}}, "message 2")
    assert call == {"type": "function", "id": "c1", "function": {"name": "tide", "arguments": {}}}


def test_the_nulls_that_a_table_adds_to_objects_are_no_arguments():
    """But those of a text are what somebody wrote."""
    arguments = {"town": "x", "days": None, "near": {"a": 1, "b": None}}
    (cleaned,) = read_calls({"name": "tide", "arguments": arguments}, "message 2")
    assert cleaned["function"]["arguments"] == {"town": "x", "near": {"a": 1}}
    (kept,) = read_calls({"name": "tide", "arguments": json.dumps(arguments)}, "message 2")
    assert kept["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    ("value", "kind", "reason"),
    [
        ("tide()", "wrong_type", "m: the tool call is not valid JSON"),
        ([7], "wrong_type", "m: tool call 1 is a number, not an object"),
        ([CALL, {}], "missing_field", 'm: tool call 2 has no "name"'),
        ({"name": "tide", "arguments": [1]}, "wrong_type", 'm: tool call 1: "arguments" is a list'),
        (
            {"name": "tide", "arguments": "{"},
            "wrong_type",
            'm: tool call 1: "arguments" is not valid',
        ),
        (
            {"name": "tide", "arguments": {"a": b""}},
            "wrong_type",
            "m: the tool call is not valid JSON",
        ),
        ({"name": "\ud800", "arguments": {}}, "characters", "m: the tool call has an unpaired"),
        (
            {"name": "t", "arguments": '"\\ud800"'},
            "characters",
            'm: tool call 1: "arguments" has an unpaired',
        ),
    ],
)
def test_a_faulty_call_is_refused(value, kind, reason):
    found, said = fault_of(read_calls, value, "m")
    assert found == kind
    assert said.startswith(reason)


def test_what_nests_too_deeply_is_refused():
    deep = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, "[" * 100_000):
        assert fault_of(read_calls, {"name": "tide", "arguments": value}, "m")[0] == "wrong_type"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("none", '"tools" is not valid JSON'),
        ({"name": "tide"}, '"tools" is an object, not a list of tools'),
        (["tide"], '"tools": tool 1 is text, not an object'),
        ([{"description": "x"}], '"tools": tool 1 has no "name"'),
    ],
)
def test_faulty_tools_are_refused(value, reason):
    assert fault_of(read_tools, value)[1].startswith(reason)
