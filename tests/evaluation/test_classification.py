"""Labels: which one an answer names, and what the matrix and macro-F1 make of them."""

from pathlib import Path

import pytest

from tests.conftest import write_jsonl
from yrunner.errors import DataError
from yrunner.evaluation.questions import read_questions
from yrunner.evaluation.tasks import (
    NO_LABEL,
    check_labels,
    confusion,
    find_label,
    labels_of,
    macro_f1,
)

LABELS = ["legal", "not legal", "合同"]


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Legal.", "legal"),
        ("This is not legal!", "not legal"),
        ("这是合同纠纷", "合同"),
        ("<think>legal?</think>合同", "合同"),
        ("legal or 合同", NO_LABEL),
        ("illegal", NO_LABEL),
        ("", NO_LABEL),
    ],
)
def test_an_answer_names_a_label_alone(answer, label):
    assert find_label(answer, LABELS) == label


def test_the_confusion_matrix_counts_every_question_once():
    references = ["a", "a", "a", "b", "b"]
    taken = ["a", "b", NO_LABEL, "b", "a"]
    assert confusion(["a", "b"], references, taken) == [[1, 1, 1], [1, 1, 0]]


def test_macro_f1_by_hand():
    references = ["a", "a", "a", "b", "c"]
    taken = ["a", "a", "b", "b", NO_LABEL]
    # a: precision 1, recall 2/3. b: precision 1/2, recall 1. c: never given.
    assert macro_f1(references, taken) == pytest.approx((4 / 5 + 2 / 3 + 0) / 3)


@pytest.fixture
def asked(tmp_path: Path):
    rows = [{"question": f"{label}?", "answer": label} for label in ("b", "a", "b")]
    return read_questions(write_jsonl(tmp_path / "l.jsonl", rows))


def test_labels_come_from_the_data_where_the_task_names_none(asked):
    assert labels_of([], asked) == ["a", "b"]
    assert labels_of(["b", "a"], asked) == ["b", "a"]
    check_labels([], asked)


def test_labels_that_were_never_seen_are_refused(asked):
    with pytest.raises(DataError, match=r'l\.jsonl row 2: has the label "a", .* only "b", "c"'):
        check_labels(["b", "c"], asked)
    with pytest.raises(DataError, match=r'l\.jsonl: no row has the label "c" of the task'):
        check_labels(["a", "b", "c"], asked)
    with pytest.raises(DataError, match=r'every row has the label "a", which leaves nothing'):
        check_labels([], asked[1:2])
