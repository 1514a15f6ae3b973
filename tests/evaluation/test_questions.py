"""Questions and references as they stand in files."""

from pathlib import Path

import pytest

from tests.conftest import write_jsonl
from yrunner.errors import DataError
from yrunner.evaluation.questions import read_prompts, read_questions, read_texts


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
    with pytest.raises(DataError, match=r"q\.jsonl row 2: \"output\" is empty.*Mend the row"):
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
        ({"question": " "}, '"question" asks nothing'),
        ({"other": "a"}, "asks nothing"),
        ([1], "is a list, not an object"),
        ({"question": 3}, '"question" is a number, not text'),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ]
            },
            '"messages" asks nothing',
        ),
    ],
)
def test_a_prompt_that_asks_nothing_is_refused_with_its_row(tmp_path: Path, row, reason):
    file = write_jsonl(tmp_path / "q.jsonl", [{"question": "a?"}, row])
    with pytest.raises(DataError, match=rf"row 2: {reason}.*Mend the row"):
        read_prompts(file)


@pytest.mark.parametrize("read", [read_questions, read_prompts, read_texts])
def test_an_empty_file_is_refused(tmp_path: Path, read):
    file = tmp_path / "q.jsonl"
    file.write_text("\n")
    with pytest.raises(DataError, match=r"q\.jsonl: holds no rows"):
        read(file)


def test_texts_are_references_that_nobody_asked_for(tmp_path: Path):
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": "根据法典"}])
    (text,) = read_texts(file)
    assert (text.messages, text.reference, text.text) == ((), "根据法典", "根据法典")
