"""A row becomes the conversation that it says, or is refused in one sentence."""

import json
from typing import get_args

import pytest

from tests.data.conftest import ASSETS
from yrunner.data.conversation import FaultyRow, Message
from yrunner.data.formats.formats import (
    FORMATS,
    detect_format,
    known_columns,
    read_conversations,
    read_row,
)
from yrunner.recipe.schema.data import DataFile

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ALPACA = {"instruction": "q", "output": "a"}
TOOL = {"type": "function", "function": {"name": "tide"}}


def turns_of(row, format_name, columns=None):
    messages, _ = read_row(row, format_name, columns or {})
    return [(message.role, message.content) for message in messages]


def fault_of(row, format_name, columns=None):
    with pytest.raises(FaultyRow) as refused:
        read_row(row, format_name, columns or {})
    assert "\n" not in str(refused.value)
    return refused.value.kind, str(refused.value)


def message_of(turn):
    if isinstance(turn, list):
        return Message(*turn)
    return Message(**turn | {"tool_calls": tuple(turn.get("tool_calls", ()))})


@pytest.mark.parametrize("format_name", FORMATS)
def test_rows_of_each_format_are_detected_and_read(format_name):
    lines = (ASSETS / f"{format_name}.jsonl").read_text("utf-8").splitlines()
    cases = [json.loads(line) for line in lines]
    assert len(cases) >= 5
    assert detect_format([case["row"] for case in cases], {}) == format_name
    for case in cases:
        messages, tools = read_row(case["row"], format_name, {})
        assert messages == tuple(map(message_of, case["turns"]))
        assert list(tools) == case.get("tools", [])


@pytest.mark.parametrize(
    ("name", "format_name", "roles"),
    [
        ("llama_factory_alpaca.json", "alpaca", ["suaua", "ua"]),
        ("llama_factory_sharegpt.json", "sharegpt", ["suaua", "uata"]),
        ("llama_factory_openai.json", "messages", ["sua", "ua"]),
        ("llama_factory_pretrain.json", "text", ["t", "t"]),
        ("y_trainer_sft.json", "alpaca", ["ua", "ua"]),
        ("y_trainer_cpt.json", "text", ["t", "t"]),
        ("y_trainer_dialogue.jsonl", "question_answer", ["ua", "uaua"]),
        ("y_trainer_prompt.jsonl", "prompt_response", ["ua", "ua"]),
        ("belle.jsonl", "alpaca", ["ua", "ua"]),
        ("firefly.jsonl", "sharegpt", ["uaua", "ua"]),
        ("minimind.jsonl", "sharegpt", ["uaua", "suata"]),
        ("trl_prompt_completion.jsonl", "prompt_response", ["ua", "uaua"]),
        ("axolotl_chat.jsonl", "messages", ["suaua", "ua"]),
        ("table.csv", "alpaca", ["ua", "ua"]),
    ],
)
def test_a_file_of_each_well_known_style_loads_without_renaming(name, format_name, roles):
    opened = read_conversations(ASSETS / "files" / name)
    conversations = list(opened.rows)
    assert opened.format == format_name
    letters = ["".join(message.role[0] for message in row.messages) for row in conversations]
    assert letters == roles


def test_every_format_can_be_written_in_a_recipe_and_says_which_columns_it_has():
    names = get_args(DataFile.model_fields["format"].annotation)
    assert names == ("auto", *FORMATS)
    assert known_columns("alpaca") == (
        "instruction", "output", "input", "history",
        "system", "system_prompt", "system_message", "tools", "functions",
    )  # fmt: skip
    assert known_columns("text") == ("text", "output")


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ([1], "not_an_object", "is a list, not an object with named fields"),
        (7, "not_an_object", "is a number, not an object with named fields"),
        (None, "not_an_object", "is null, not an object with named fields"),
        ("q", "not_an_object", "is text, not an object with named fields"),
        ({"instruction": "q"}, "missing_field", 'has no "output"'),
        ({**ALPACA, "instruction": " \n"}, "empty", '"instruction" is empty'),
        ({**ALPACA, "output": ""}, "empty", '"output" is empty, so there is nothing to train on'),
        ({**ALPACA, "output": None}, "wrong_type", '"output" is null, not text'),
        ({**ALPACA, "output": float("nan")}, "wrong_type", '"output" is a number, not text'),
        ({**ALPACA, "output": True}, "wrong_type", '"output" is true or false, not text'),
        ({**ALPACA, "output": b"a"}, "wrong_type", '"output" is bytes, not text'),
        ({**ALPACA, "input": ["x"]}, "wrong_type", '"input" is a list, not text'),
        ({**ALPACA, "system": 1}, "wrong_type", '"system" is a number, not text'),
        ({**ALPACA, "images": ["a"]}, "wrong_type", 'has "images", which is not supported'),
        ({**ALPACA, "tools": "{"}, "wrong_type", None),
    ],
)  # fmt: skip
def test_a_faulty_alpaca_row_is_refused(row, kind, reason):
    fault = fault_of(row, "alpaca")
    assert fault == (kind, reason or fault[1])


@pytest.mark.parametrize("history", ["x", {"q": "a"}, [["q"]], [["q", 1]], [["q", "a", "b"]], 7])
def test_a_history_of_anything_but_pairs_or_messages_is_refused(history):
    reason = '"history" is not a list of [question, answer] pairs or messages'
    for row, name in ((ALPACA, "alpaca"), ({"query": "q", "response": "a"}, "question_answer")):
        assert fault_of({**row, "history": history}, name) == ("wrong_type", reason)


def test_a_history_that_ends_with_a_question_is_refused():
    row = {**ALPACA, "history": [USER]}
    assert fault_of(row, "alpaca") == (
        "roles",
        "message 2 (user) cannot follow a message with role user",
    )


@pytest.mark.parametrize(
    ("row", "format_name", "kind", "reason"),
    [
        ({"prompt": "q"}, "prompt_response", "missing_field", 'has no "response" or "completion"'),
        ({"prompt": " ", "response": "a"}, "prompt_response", "empty", '"prompt" is empty'),
        (
            {"prompt": [USER], "completion": " "},
            "prompt_response",
            "empty",
            "message 2 (assistant), the last reply, is empty",
        ),
        (
            {"prompt": {"a": 1}, "completion": "a"},
            "prompt_response",
            "wrong_type",
            '"prompt" is an object, not a list of messages',
        ),
        (
            {"prompt": [], "completion": [REPLY]},
            "prompt_response",
            "empty",
            '"prompt" has no messages',
        ),
        ({"answer": "a"}, "question_answer", "missing_field", 'has no "question" or "query"'),
        (
            {"question": "q", "answer": "7", "response": "3 + 4 = 7"},
            "question_answer",
            "wrong_type",
            'has both "answer" and "response"; to use the second, set columns: {answer: response}',
        ),
        ({"text": " \n"}, "text", "empty", '"text" is empty'),
        ({"text": 7}, "text", "wrong_type", '"text" is a number, not text'),
        (
            {"instruction": "q", "output": "a"},
            "text",
            "missing_field",
            'has no "text", and "output" answers a question',
        ),
        (
            {"messages": [USER, REPLY], "tools": [TOOL], "functions": [TOOL]},
            "messages",
            "wrong_type",
            "describes its tools twice; keep one of them",
        ),
        (
            {"messages": [{"role": "system", "content": "s"}, USER, REPLY], "system": "t"},
            "messages",
            "wrong_type",
            'has a "system" that differs from its system message; keep one of them',
        ),
    ],
)
def test_faulty_rows_of_the_other_formats_are_refused(row, format_name, kind, reason):
    assert fault_of(row, format_name) == (kind, reason)


def test_a_system_column_may_repeat_the_system_message():
    opening = {"role": "system", "content": "s"}
    row = {"messages": [opening, USER, REPLY], "system": "s"}
    assert turns_of(row, "messages") == [("system", "s"), ("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("row", "format_name", "place"),
    [
        ({**ALPACA, "system": "ab\ud83d"}, "alpaca", r"message 1 (system): character 3 is \ud83d"),
        (
            {"messages": [{**USER, "content": "\udc00"}, REPLY]},
            "messages",
            r"message 1 (user): character 1 is \udc00",
        ),
        ({"text": "\udfff"}, "text", r"message 1 (text): character 1 is \udfff"),
    ],
)
def test_half_a_character_is_refused(row, format_name, place):
    reason = f"{place}, an unpaired surrogate"
    assert fault_of(row, format_name) == ("characters", reason)


def test_columns_give_the_files_names():
    columns = {"instruction": "ask", "output": "reply"}
    row = {"ask": "q", "reply": "a", "id": 7}
    assert turns_of(row, "alpaca", columns) == [("user", "q"), ("assistant", "a")]
    assert detect_format([row], columns) == "alpaca"
    assert fault_of({"ask": "q"}, "alpaca", columns) == ("missing_field", 'has no "reply"')


def test_columns_can_swap_two_names():
    swapped = {"instruction": "output", "output": "instruction"}
    assert turns_of(ALPACA, "alpaca", swapped) == [("user", "a"), ("assistant", "q")]


def test_a_renamed_column_never_falls_back_to_the_one_of_that_name():
    _, reason = fault_of(ALPACA, "alpaca", {"output": "better_output"})
    assert reason == 'has no "better_output"'


def test_a_renamed_column_decides_between_two_names_of_one_thing():
    row = {"question": "q", "answer": "7", "response": "3 + 4 = 7"}
    for chosen in ("answer", "response"):
        turns = turns_of(row, "question_answer", {"answer": chosen})
        assert turns == [("user", "q"), ("assistant", row[chosen])]
        assert detect_format([row], {"answer": chosen}) == "question_answer"


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([[1], "text"], "has no row with named fields"),
        ([{"q": "a", "id": 1}], "matches no known format; its columns are id, q"),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], None),
        (
            [{**ALPACA, "text": "t"}],
            "matches alpaca and text; its columns are instruction, output, text",
        ),
        (
            [{"messages": [USER, REPLY], "conversations": []}],
            "matches sharegpt and messages; its columns are conversations, messages",
        ),
        (
            [{"prompt": "q", "query": "i", "response": "a"}],
            "matches prompt_response and question_answer; its columns are prompt, query, response",
        ),
        ([{1: "a", "\ud800": "b"}], r"matches no known format; its columns are 1, \ud800"),
    ],
)
def test_a_file_that_fits_no_format_or_two_is_refused(rows, reason):
    with pytest.raises(FaultyRow) as refused:
        detect_format(rows, {})
    assert str(refused.value).startswith(reason or "matches no known format")


def test_columns_tell_the_formats_of_a_file_apart_that_fits_two():
    row = {"prompt": "q", "query": "i", "response": "a"}
    columns = {"instruction": "prompt", "input": "query", "output": "response"}
    assert detect_format([row], columns) == "alpaca"
    assert turns_of(row, "alpaca", columns) == [("user", "q\ni"), ("assistant", "a")]


def test_faulty_rows_in_front_do_not_hide_the_format():
    assert detect_format([7, {"instruction": "q"}, ALPACA, ALPACA], {}) == "alpaca"
