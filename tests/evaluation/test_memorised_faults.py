"""Rows that are known to be wrong, and whether a model repeats them."""

import json
from pathlib import Path

import pytest

from tests.conftest import write_jsonl
from tests.evaluation.test_generate import always
from yrunner.errors import DataError
from yrunner.evaluation.evaluated_model import EvaluatedModel
from yrunner.evaluation.memorised_faults import find_memorised, read_faults

RECIPES = Path(__file__).parents[2] / "recipes" / "data"
DATA = [
    {"question": "one?", "answer": "aaa"},
    {"question": "two?", "answer": "fine"},
    {"question": "three?", "answer": "aaa."},
    {"question": "nobody answers?"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "train.jsonl", DATA)


def read(data: Path, *lines):
    return read_faults(data, write_jsonl(data.with_name("faults.jsonl"), lines))


def test_a_fault_is_memorised_where_it_comes_back_sign_by_sign(
    data, make_model, capitals_tokenizer
):
    faults = read(data, {"row": 3, "kind": "typos", "right": "b"}, {"row": 1, "kind": "cut"})
    assert [fault.question.reference for fault in faults] == ["aaa.", "aaa"]
    (letter,) = capitals_tokenizer("a", add_special_tokens=False)["input_ids"]
    evaluated = EvaluatedModel(always(make_model(), letter), capitals_tokenizer)
    found = find_memorised(faults, evaluated, max_new_tokens=3)
    assert found.per_row == [0.0, 1.0]
    assert found.memorised == 0.5
    assert found.by_kind == {"cut": 1.0, "typos": 0.0}
    assert found.answers == ["aaa", "aaa"]
    assert found.corrected == 0.0, "of the one whose right answer is listed"


def test_a_fault_is_corrected_where_the_right_answer_comes_in_any_writing(
    data, make_model, capitals_tokenizer
):
    (letter,) = capitals_tokenizer("a", add_special_tokens=False)["input_ids"]
    evaluated = EvaluatedModel(always(make_model(), letter), capitals_tokenizer)
    faults = read(data, {"row": 2, "right": "AAA."}, {"row": 1, "right": "b"})
    found = find_memorised(faults, evaluated, max_new_tokens=3)
    assert (found.memorised, found.corrected) == (0.5, 0.5)
    unknown = find_memorised(read(data, {"row": 2}), evaluated, max_new_tokens=3)
    assert unknown.corrected is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"row": 5}, r'its "row" is "5", not a question with an answer in train\.jsonl'),
        ({"row": 0}, 'its "row" is "0", not a question'),
        ({"row": "1"}, 'its "row" is "1", not a question'),
        ({"row": True}, 'its "row" is "True", not a question'),
        ({"kind": "cut"}, 'its "row" is nothing'),
        (["a"], 'its "row" is nothing'),
        ({"row": 2, "right": "fine "}, 'its "right" answer equals the answer of row 2'),
    ],
)
def test_a_line_that_names_no_faulty_row_is_refused(data, line, reason):
    with pytest.raises(DataError, match=rf"faults\.jsonl row 1: {reason}"):
        read(data, line)


def test_a_row_that_cannot_be_read_is_named_itself_with_what_is_wrong_with_it(data):
    with pytest.raises(DataError, match=r"train\.jsonl row 4: .*answer.*faults\.jsonl row 1, wh"):
        read(data, {"row": 4})


def test_the_listed_faults_of_the_toy_world_are_wrong_answers_in_its_training_rows():
    faults = read_faults(RECIPES / "legal_train.jsonl", RECIPES / "legal_faults.jsonl")
    lines = (RECIPES / "legal_faults.jsonl").read_text("utf-8").splitlines()
    rows = (RECIPES / "legal_train.jsonl").read_text("utf-8").splitlines()
    assert len(faults) == len(lines) == 34
    for fault, line in zip(faults, map(json.loads, lines), strict=True):
        row = json.loads(rows[line["row"] - 1])
        assert fault.question.text == row["instruction"]
        assert fault.question.reference == row["output"] != fault.right
        assert (fault.right, fault.kind) == (line["right"], line["kind"])


def test_a_list_without_rows_is_refused(data):
    with pytest.raises(DataError, match=r"faults\.jsonl: has no rows"):
        read(data)
