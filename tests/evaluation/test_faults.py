"""Rows that are known to be wrong, and whether a model repeats them."""

from pathlib import Path

import pytest

from tests.conftest import write_jsonl
from tests.evaluation.test_generate import always
from yrunner.errors import DataError
from yrunner.evaluation.candidate import Candidate
from yrunner.evaluation.faults import find_memorised, read_faults

DATA = [
    {"question": "one?", "answer": "aaa"},
    {"question": "two?", "answer": "fine"},
    {"question": "three?", "answer": "aaa."},
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
    candidate = Candidate(always(make_model(), letter), capitals_tokenizer)
    found = find_memorised(faults, candidate, max_new_tokens=3)
    assert found.per_row == [0.0, 1.0]
    assert found.memorised == 0.5
    assert found.by_kind == {"cut": 1.0, "typos": 0.0}
    assert found.answers == ["aaa", "aaa"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"row": 4}, r'its "row" is "4", and train\.jsonl has the rows 1 to 3'),
        ({"kind": "cut"}, 'its "row" is nothing'),
        (["a"], 'its "row" is nothing'),
        ({"row": 2, "right": "fine "}, 'its "right" answer is the one that row 2'),
    ],
)
def test_a_line_that_names_no_faulty_row_is_refused(data, line, reason):
    with pytest.raises(DataError, match=rf"faults\.jsonl row 1: {reason}"):
        read(data, line)


def test_a_list_without_rows_is_refused(data):
    with pytest.raises(DataError, match=r"faults\.jsonl: lists no row"):
        read(data)
