"""Questions, references and choices as they are found in data files."""

from pathlib import Path

import pytest

from tests.conftest import write_jsonl
from yrunner.errors import DataError
from yrunner.evaluation.questions import read_choices, read_prompts, read_questions, read_texts


def test_the_last_assistant_turn_is_the_reference(tmp_path: Path):
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
    (question,) = read_questions(write_jsonl(tmp_path / "q.jsonl", [{"messages": talk}]))
    assert question.reference == "2"
    assert question.text == "Two?"
    assert question.origin.row == 1
    assert [message.content for message in question.messages] == ["Be brief.", "One?", "1", "Two?"]


def test_a_faulty_question_is_refused_with_its_row(tmp_path: Path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}]
    with pytest.raises(DataError, match=r"q\.jsonl row 2: \"output\" is empty.*Correct the row"):
        read_questions(write_jsonl(tmp_path / "q.jsonl", rows))


def test_plain_texts_are_no_questions(tmp_path: Path):
    with pytest.raises(DataError, match="row 1: is a plain text, not a question"):
        read_questions(write_jsonl(tmp_path / "q.jsonl", [{"text": "a"}]))


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a?", "input": "b"},
        {"question": "a?", "answer": ""},
        {"messages": [{"role": "user", "content": "a?"}]},
        {"conversations": [{"from": "human", "value": "a?"}]},
    ],
)
def test_questions_without_references_are_refused_where_some_are_needed(tmp_path: Path, row):
    file = write_jsonl(tmp_path / "q.jsonl", [row])
    with pytest.raises(DataError, match=r"q\.jsonl: has questions without reference answers\. Add"):
        read_questions(file)
    (question,) = read_prompts(file)
    assert question.reference == ""
    assert question.text == ("a?\nb" if "input" in row else "a?")


def test_prompts_may_have_references_and_system_messages(tmp_path: Path):
    file = write_jsonl(tmp_path / "q.jsonl", [{"question": "a?", "answer": "b"}])
    assert [question.reference for question in read_prompts(file)] == ["b"]
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a?", "system": "Be brief."}])
    (question,) = read_prompts(file)
    assert [(turn.role, turn.content) for turn in question.messages] == [
        ("system", "Be brief."),
        ("user", "a?"),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": " "}, 'has no question in "question"'),
        ({"other": "a"}, "has no question"),
        ([1], "is a list, not an object"),
        ({"question": 3}, '"question" is a number, not text'),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ]
            },
            'has no question in "messages"',
        ),
    ],
)
def test_a_prompt_that_asks_nothing_is_refused_with_its_row(tmp_path: Path, row, reason):
    file = write_jsonl(tmp_path / "q.jsonl", [{"question": "a?"}, row])
    with pytest.raises(DataError, match=rf"row 2: {reason}.*Correct the row"):
        read_prompts(file)


@pytest.mark.parametrize("read", [read_questions, read_prompts, read_texts])
def test_an_empty_file_is_refused(tmp_path: Path, read):
    file = tmp_path / "q.jsonl"
    file.write_text("\n")
    with pytest.raises(DataError, match=r"q\.jsonl: has no rows"):
        read(file)


def test_texts_are_references_that_nobody_asked_for(tmp_path: Path):
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": "根据法典"}])
    (text,) = read_texts(file)
    assert (text.messages, text.reference, text.text) == ((), "根据法典", "根据法典")


COLUMNS = {"question": "question", "choices": "choices", "answer": "answer"}
LIST = ["九年", "5", "0", "B"]


def read(tmp_path: Path, row, **columns):
    file = write_jsonl(tmp_path / "c.jsonl", [row])
    (question,) = read_choices(file, **{**COLUMNS, **columns})
    return question


@pytest.mark.parametrize(
    ("answer", "right"),
    [(2, "0"), ("2", "0"), ("A", "九年"), ("d", "B"), ("九年", "九年"), ("5", "5"), ("B", "B")],
)
def test_the_right_choice_is_a_number_a_letter_or_a_text(tmp_path, answer, right):
    question = read(tmp_path, {"question": "How long?", "choices": LIST, "answer": answer})
    assert question.reference == right
    assert question.choices == tuple(LIST)
    assert question.text == "How long?"


def test_choices_may_stand_in_columns_of_any_names(tmp_path):
    row = {"Q": "How long?", "A": "one", "B": "two", "C": "", "key": "B"}
    assert read(tmp_path, row, question="Q", answer="key").choices == ("one", "two")
    row = {"question": "q", "right": "one", "wrong": "two", "answer": 0}
    assert read(tmp_path, row, choices=["wrong", "right"]).reference == "two"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "q", "choices": ["a"], "answer": 0}, '"choices" is not a list of two'),
        ({"question": "q", "choices": "ab", "answer": 0}, '"choices" is not a list of two'),
        ({"choices": ["a", "b"], "answer": 0}, 'has no text in "question"'),
        ({"question": "q", "choices": ["a", "b"]}, 'has no "answer"'),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "is a number, not one of"),
        ({"question": "q", "choices": ["a", "b"], "answer": "c"}, '"answer" is "c", not one of'),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "not one of the 2"),
        (["a"], "is a list, not an object"),
    ],
)
def test_a_row_that_cannot_be_asked_is_refused(tmp_path, row, reason):
    with pytest.raises(DataError, match=rf"c\.jsonl row 1: .*{reason}"):
        read(tmp_path, row)


def test_damage_and_empty_files_are_refused(tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_text("")
    with pytest.raises(DataError, match="has no rows"):
        read_choices(file, **COLUMNS)
    file.write_text("{")
    with pytest.raises(DataError, match=r"row 1: .*Correct the row"):
        read_choices(file, **COLUMNS)
