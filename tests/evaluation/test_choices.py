"""Multiple-choice rows of the kinds that are about."""

from pathlib import Path

import pytest

from tests.conftest import write_jsonl
from yrunner.errors import DataError
from yrunner.evaluation.questions import read_choices

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
        ({"question": "q", "choices": ["a"], "answer": 0}, '"choices" is no list of two'),
        ({"question": "q", "choices": "ab", "answer": 0}, '"choices" is no list of two'),
        ({"choices": ["a", "b"], "answer": 0}, 'has no text in "question"'),
        ({"question": "q", "choices": ["a", "b"]}, 'has no "answer", so no choice is right'),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "is a number, which is none of"),
        ({"question": "q", "choices": ["a", "b"], "answer": "c"}, '"answer" is "c", which is none'),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "which is none of its 2"),
        (["a"], "is a list, not an object"),
    ],
)
def test_a_row_that_cannot_be_asked_is_refused(tmp_path, row, reason):
    with pytest.raises(DataError, match=rf"c\.jsonl row 1: .*{reason}"):
        read(tmp_path, row)


def test_damage_and_empty_files_are_refused(tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_text("")
    with pytest.raises(DataError, match="holds no rows"):
        read_choices(file, **COLUMNS)
    file.write_text("{")
    with pytest.raises(DataError, match=r"row 1: .*Mend the row"):
        read_choices(file, **COLUMNS)
