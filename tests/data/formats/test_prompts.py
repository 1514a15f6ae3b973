"""Rows become prompts without their answers, with the columns that rewards read."""

import json

import pytest

from yrunner.data.dataset.row_report import Refusal
from yrunner.data.formats.columns import EVERY_COLUMN, Need
from yrunner.data.formats.formats import Reading
from yrunner.data.formats.prompts import read_prompts
from yrunner.errors import DataError

ANSWER = Need("answer", "exact", "texts")
TURNS = [{"role": "user", "content": "1 + 1?"}]
REPLY = {"role": "assistant", "content": "2"}


@pytest.fixture
def read(write):
    """The rows of a file with these rows: prompts or refusals."""

    def read(*rows, needs=(), name="rows.jsonl", **reading):
        file = write(name, "\n".join(json.dumps(row) for row in rows))
        return read_prompts(file, Reading(**reading), needs)

    return read


@pytest.mark.parametrize(
    ("row", "format_name", "answer"),
    [
        ({"prompt": "1 + 1?"}, "prompt_response", None),
        ({"prompt": "1 + 1?", "answer": 2}, "prompt_response", 2),
        ({"prompt": TURNS, "completion": "2"}, "prompt_response", "2"),
        ({"prompt": TURNS, "completion": [REPLY]}, "prompt_response", "2"),
        ({"prompt": TURNS, "response": REPLY, "answer": "two"}, "prompt_response", "two"),
        ({"prompt": [*TURNS, REPLY]}, "prompt_response", "2"),
        ({"prompt": json.dumps(TURNS), "answer": "2"}, "prompt_response", "2"),
        ({"prompt": TURNS, "question": "1 + 1?", "answer": "2"}, "prompt_response", "2"),
        ({"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}, "prompt_response", None),
        ({"question": "1 + 1?", "answer": "2"}, "question_answer", "2"),
        ({"query": "1 + 1?", "response": "2", "label": 0}, "question_answer", "2"),
        ({"instruction": "1 + 1?", "input": "", "output": "2"}, "alpaca", "2"),
        ({"instruction": "1 + 1?"}, "alpaca", None),
        ({"instruction": "1 + 1?", "output": "", "answer": "2"}, "alpaca", "2"),
        ({"messages": TURNS}, "messages", None),
        ({"messages": [*TURNS, REPLY]}, "messages", "2"),
        ({"messages": [*TURNS, REPLY], "answer": "II"}, "messages", "II"),
        ({"conversations": [{"from": "human", "value": "1 + 1?"}]}, "sharegpt", None),
        ([*TURNS, REPLY], "messages", "2"),
    ],
)
def test_a_prompt_is_what_comes_before_the_final_answer(read, row, format_name, answer):
    opened = read(row)
    ((prompt,),) = opened.rows
    assert opened.format == format_name
    assert [(turn.role, turn.content) for turn in prompt.messages] == [("user", "1 + 1?")]
    assert prompt.columns.get("answer") == answer
    assert prompt.origin.row == 1
    if isinstance(row, dict):
        assert {**row, "answer": answer} == {"answer": None, **prompt.columns}


def test_history_system_and_tools_are_part_of_the_prompt(read):
    tool = {"type": "function", "function": {"name": "add"}}
    ((asked,), (talk,)) = read(
        {"question": "And 2?", "history": [["1?", "one"]], "system": "Count.", "answer": "two"},
        {"question": "1?", "tools": [tool]},
    ).rows
    assert [turn.content for turn in asked.messages] == ["Count.", "1?", "one", "And 2?"]
    assert talk.tools == (tool,)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}
    result = {"role": "tool", "content": "2"}
    ((prompt,),) = read({"messages": [*TURNS, call, result, REPLY]}).rows
    assert [turn.role for turn in prompt.messages] == ["user", "assistant", "tool"]


def test_columns_of_the_recipe_name_what_asks_and_what_is_right(read):
    rows = {"problem": "1 + 1?", "solution": "2", "answer": "wrong"}
    ((prompt,),) = read(rows, columns={"prompt": "problem", "answer": "solution"}).rows
    assert prompt.messages[0].content == "1 + 1?"
    assert prompt.columns == {**rows, "answer": "2"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "", "answer": "2"}, '"prompt" is empty'),
        ({"prompt": "  ", "answer": "2"}, '"prompt" is empty'),
        ({"prompt": [], "answer": "2"}, '"prompt" has no messages'),
        ({"prompt": 3, "answer": "2"}, '"prompt" is a number, not a list of messages'),
        ({"answer": "2"}, 'has no "prompt"'),
        ({"prompt": [REPLY], "answer": "2"}, "has only an answer, and no question"),
        ({"prompt": [{"role": "system", "content": "s"}], "answer": "2"}, "starts with assistant"),
        ({"prompt": [*TURNS, REPLY, REPLY], "answer": "2"}, "cannot follow a message with role"),
        ({"prompt": "\ud800", "answer": "2"}, "unpaired surrogate"),
        ({"prompt": "a", "image": "x.png", "answer": "2"}, 'has "image", which is not supported'),
        ({"prompt": "a"}, '"answer" is missing, which the reward "exact" needs'),
        ({"prompt": "a", "answer": None}, '"answer" is empty, which the reward "exact" needs'),
        ({"prompt": "a", "answer": ""}, '"answer" is empty, which the reward "exact" needs'),
        ({"prompt": "a", "answer": []}, '"answer" is empty, which the reward "exact" needs'),
        ({"prompt": "a", "answer": {"x": 1}}, '"answer" is an object, not a text, a number, or'),
        ({"prompt": "a", "answer": ["x", None]}, '"answer" is a list, not a text, a number, or'),
    ],
)
def test_a_row_that_cannot_be_asked_or_judged_is_refused(read, row, reason):
    _, fate = read({"prompt": "a", "answer": "b"}, row, needs=[ANSWER]).rows
    assert isinstance(fate, Refusal) and fate.origin.row == 2
    assert reason in fate.reason


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("number", "none", 'is "none", which has no number'),
        ("number", True, "is true or false, which has no number"),
        ("number", [3], "is a list, which has no number"),
        ("schema", "{", "is not JSON"),
        ("schema", {"type": "nonsense"}, "is not a JSON Schema"),
        ("schema", '"text"', "is not a JSON Schema (it is not an object)"),
        ("schema", {"$ref": "#/$defs/no"}, 'refers to "#/$defs/no"'),
        ("schema", {"$ref": "https://example.com/schema"}, "which it does not"),
    ],
)
def test_what_a_reward_needs_has_a_kind(read, kind, value, reason):
    good = {"number": "so 3", "schema": {"type": "string"}}[kind]
    rows = [{"prompt": "a", "x": good}, {"prompt": "a", "x": value}]
    kept, refused = read(*rows, needs=[Need("x", "r", kind)]).rows
    assert kept[0].columns["x"] == good
    assert reason in refused.reason and 'the reward "r" needs' in refused.reason


def test_a_column_that_no_row_has_is_one_error_with_the_columns_there_are(read):
    rows = [{"prompt": "a", "solution": "b"}] * 3
    with pytest.raises(DataError) as caught:
        read(*rows, needs=[ANSWER])
    assert 'rows.jsonl row 1: has no "answer", which the reward "exact" needs' in str(caught.value)
    assert "its columns are prompt, solution" in str(caught.value)
    read(*rows, needs=[Need("level", "r", "optional")])


@pytest.mark.parametrize(
    ("row", "options", "sentence"),
    [
        ({"problem": "1?", "solution": "2"}, {}, "has no prompt and no question; its columns are"),
        ({"question": "1?", "instruction": "a"}, {}, "matches alpaca and question_answer"),
        ({"text": "1?"}, {"format": "text"}, "plain texts (format: text), which ask nothing"),
        ({"prompt": "1?"}, {"columns": {"promt": "x"}}, 'columns has "promt"'),
    ],
)
def test_a_file_without_one_way_to_ask_is_refused(read, row, options, sentence):
    with pytest.raises(DataError) as caught:
        read(row, **options)
    assert sentence in str(caught.value) and caught.value.exit_code == 2


def test_columns_that_nothing_reads_are_named(read):
    row = {"prompt": "a", "answer": "b", "level": 3, "topic": "c"}
    assert read(row).unread == ("level", "topic")
    assert read(row, needs=[Need("level", "r")]).unread == ("topic",)
    assert read(row, needs=[Need(EVERY_COLUMN, "r", "optional")]).unread == ()


def test_a_weight_is_no_weight_of_the_row_if_a_reward_compares_with_it(read):
    rows = [{"prompt": "How heavy?", "weight": 70}]
    ((kept,),) = read(*rows, needs=[Need("weight", "number", "number")]).rows
    assert kept.columns["weight"] == 70
    (refused,) = read(*rows).rows
    assert '"weight" is not 0 or 1' in refused.reason
