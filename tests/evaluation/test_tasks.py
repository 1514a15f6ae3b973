"""Answers beside their references, and the share of them that is exact."""

import pytest

from yrunner.evaluation.text_metrics import Answered, share_right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("<think>\n\n</think>\n\nBelo", True),
        ("Belo", True),
        (" Belo\n", True),
        ("belo.", True),
        ("Bela", False),
        ("", False),
    ],
)
def test_an_answer_is_right_when_it_says_what_the_reference_says(answer, right):
    assert Answered("Capital?", "Belo", answer).is_right is right


def test_the_share_of_right_answers():
    answered = [Answered("q", "a", "a"), Answered("q", "a", "b"), Answered("q", "a", "a")]
    assert share_right(answered) == pytest.approx(2 / 3)
