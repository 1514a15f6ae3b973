"""A row becomes the conversation that it says, or is refused in one sentence."""

import json

import pytest

from tests.data.conftest import ASSETS
from yrunner.data.conversation import FaultyRow, Message
from yrunner.data.formats import FORMAT_KEYS, FORMATS, detect_format, known_columns, read_row

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ALPACA = {"instruction": "q", "output": "a"}


def turns_of(row, format_name, columns=None):
    return [(it.role, it.content) for it in read_row(row, format_name, columns or {})]


def reason_of(row, format_name, columns=None):
    with pytest.raises(FaultyRow) as refused:
        read_row(row, format_name, columns or {})
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("format_name", FORMATS)
def test_rows_of_each_format_are_detected_and_read(format_name):
    lines = (ASSETS / f"{format_name}.jsonl").read_text("utf-8").splitlines()
    cases = [json.loads(line) for line in lines]
    rows = [case["row"] for case in cases]
    assert len(rows) == 5
    assert detect_format(rows, {}) == format_name
    for case in cases:
        expected = tuple(Message(role, content) for role, content in case["turns"])
        assert read_row(case["row"], format_name, {}) == expected


def test_every_format_says_which_columns_it_has():
    assert set(FORMAT_KEYS) == set(FORMATS)
    assert known_columns("alpaca") == ("instruction", "output", "input", "system", "history")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "is a list, not an object with named fields"),
        (7, "is a number, not an object with named fields"),
        (None, "is null, not an object with named fields"),
        ("q", "is text, not an object with named fields"),
        ({"instruction": "q"}, 'has no "output"'),
        ({**ALPACA, "instruction": " \n"}, '"instruction" is empty'),
        ({**ALPACA, "output": ""}, '"output" is empty, there is nothing to learn'),
        ({**ALPACA, "output": None}, '"output" is null, not text'),
        ({**ALPACA, "output": float("nan")}, '"output" is a number, not text'),
        ({**ALPACA, "output": True}, '"output" is true or false, not text'),
        ({**ALPACA, "output": b"a"}, '"output" is bytes, not text'),
        ({**ALPACA, "input": ["x"]}, '"input" is a list, not text'),
        ({**ALPACA, "system": 1}, '"system" is a number, not text'),
        ({**ALPACA, "history": "x"}, '"history" is not a list of [question, answer] pairs'),
        ({**ALPACA, "history": {"q": "a"}}, '"history" is not a list of [question, answer] pairs'),
        ({**ALPACA, "history": [["q"]]}, '"history" is not a list of [question, answer] pairs'),
        ({**ALPACA, "history": [["q", 1]]}, '"history" is not a list of [question, answer] pairs'),
    ],
)
def test_a_faulty_alpaca_row_is_refused(row, reason):
    assert reason_of(row, "alpaca") == reason


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], '"messages" is not a list of messages'),
        ("q", '"messages" is not a list of messages'),
        (None, '"messages" is not a list of messages'),
        ([USER, ["assistant", "a"]], 'message 2 has no "role" and "content"'),
        ([USER, {"role": "assistant"}], 'message 2 has no "role" and "content"'),
        (
            [{"role": "human", "content": "q"}, REPLY],
            'message 1 has role "human", known are system, user, assistant, tool',
        ),
        (
            [{"role": ["user"], "content": "q"}, REPLY],
            "message 1 has role a list, known are system, user, assistant, tool",
        ),
        (
            [{"role": "text", "content": "q"}, REPLY],
            'message 1 has role "text", known are system, user, assistant, tool',
        ),
        (
            [USER, {"role": "x" * 999 + "\ud800", "content": "q"}],
            f'message 2 has role "{"x" * 40}...", known are system, user, assistant, tool',
        ),
        ([USER, {"role": "assistant", "content": None}], "message 2: content is null, not text"),
        ([USER, {**REPLY, "content": [{}]}], "message 2: content is a list, not text"),
        (
            [USER, {**REPLY, "tool_calls": [{"id": 1}]}],
            'message 2 has "tool_calls", which cannot be learned from yet',
        ),
        (
            [USER, {**REPLY, "reasoning_content": "hm"}],
            'message 2 has "reasoning_content", which cannot be learned from yet',
        ),
        ([USER], "has no assistant message, there is nothing to learn"),
        ([REPLY], "the conversation begins with assistant, not with user"),
        ([USER, REPLY, USER], "the conversation ends with user, not with assistant"),
        ([USER, USER, REPLY], "two user messages follow each other"),
        ([USER, REPLY, REPLY], "two assistant messages follow each other"),
        (
            [USER, {"role": "system", "content": "s"}, REPLY],
            "message 2 is a system message, only the first can be one",
        ),
    ],
)
def test_faulty_messages_are_refused(messages, reason):
    assert reason_of({"messages": messages}, "messages") == reason


@pytest.mark.parametrize(
    ("row", "format_name", "reason"),
    [
        (
            {**ALPACA, "system": "ab\ud83d"},
            "alpaca",
            r"message 1 (system): character 3 is \ud83d, half of a character that was cut in two",
        ),
        (
            {"messages": [{**USER, "content": "\udc00"}, REPLY]},
            "messages",
            r"message 1 (user): character 1 is \udc00, half of a character that was cut in two",
        ),
        (
            {"text": "\udfff"},
            "text",
            r"message 1 (text): character 1 is \udfff, half of a character that was cut in two",
        ),
    ],
)
def test_half_a_character_is_refused(row, format_name, reason):
    assert reason_of(row, format_name) == reason


def test_an_empty_text_is_refused():
    assert reason_of({"text": " \n"}, "text") == '"text" is empty'
    assert reason_of({"text": 7}, "text") == '"text" is a number, not text'


def test_nul_and_empty_extra_fields_change_nothing():
    reply = {**REPLY, "content": "a\x00b", "tool_calls": None, "name": None}
    assert turns_of({"messages": [USER, reply]}, "messages")[1] == ("assistant", "a\x00b")


def test_columns_give_the_files_names():
    columns = {"instruction": "question", "output": "reply"}
    row = {"question": "q", "reply": "a", "id": 7}
    assert turns_of(row, "alpaca", columns) == [("user", "q"), ("assistant", "a")]
    assert detect_format([row], columns) == "alpaca"
    assert reason_of({"question": "q"}, "alpaca", columns) == 'has no "reply"'


def test_columns_can_swap_two_names():
    swapped = {"instruction": "output", "output": "instruction"}
    assert turns_of(ALPACA, "alpaca", swapped) == [("user", "a"), ("assistant", "q")]


def test_a_renamed_column_never_falls_back_to_the_one_of_that_name():
    assert reason_of(ALPACA, "alpaca", {"output": "better_output"}) == 'has no "better_output"'


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([[1], "text"], "holds no row with named fields"),
        ([{"q": "a", "id": 1}], "fits no format that is known; its columns are id, q"),
        (
            [{**ALPACA, "text": "t"}],
            "fits alpaca and text; its columns are instruction, output, text",
        ),
        ([{1: "a", "\ud800": "b"}], r"fits no format that is known; its columns are 1, \ud800"),
    ],
)
def test_a_file_that_fits_no_format_or_two_is_refused(rows, reason):
    with pytest.raises(FaultyRow) as refused:
        detect_format(rows, {})
    assert str(refused.value) == reason


def test_faulty_rows_in_front_do_not_hide_the_format():
    assert detect_format([7, {"instruction": "q"}, ALPACA, ALPACA], {}) == "alpaca"
