"""Questions with references, and the share of them that is answered exactly."""

from pathlib import Path

import pytest

from tests.conftest import write_jsonl
from yrunner.errors import DataError
from yrunner.evaluation.tasks import Answered, read_questions, share_right


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
    assert [message.content for message in question.messages] == ["Be brief.", "One?", "1", "Two?"]


def test_a_faulty_question_is_refused_with_its_row(tmp_path: Path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}]
    with pytest.raises(DataError, match=r"q\.jsonl row 2: \"output\" is empty.*Mend the row"):
        read_questions(write_jsonl(tmp_path / "q.jsonl", rows))


def test_plain_texts_are_no_questions(tmp_path: Path):
    with pytest.raises(DataError, match="row 1: is a plain text, not a question"):
        read_questions(write_jsonl(tmp_path / "q.jsonl", [{"text": "a"}]))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("<think>\n\n</think>\n\nBelo", True),
        ("Belo", True),
        (" Belo\n", True),
        ("belo", False),
        ("Belo.", False),
        ("", False),
    ],
)
def test_an_answer_is_right_when_it_is_the_reference_but_for_outer_blanks(answer, right):
    assert Answered("Capital?", "Belo", answer).is_right is right


def test_the_share_of_right_answers():
    answered = [Answered("q", "a", "a"), Answered("q", "a", "b"), Answered("q", "a", "a")]
    assert share_right(answered) == pytest.approx(2 / 3)
