"""Listed faults are found in the data that they name, or the line that is wrong is told."""

import json
from pathlib import Path

import pytest

from tests.conftest import write_jsonl
from yrunner.errors import DataError
from yrunner.evaluation.faults import read_faults

RECIPES = Path(__file__).parents[2] / "recipes" / "data"


def test_the_listed_faults_of_the_toy_world_are_wrong_answers_in_its_training_rows():
    faults = read_faults(RECIPES / "legal_faults.jsonl", RECIPES / "legal_train.jsonl")
    lines = (RECIPES / "legal_faults.jsonl").read_text("utf-8").splitlines()
    rows = (RECIPES / "legal_train.jsonl").read_text("utf-8").splitlines()
    assert len(faults) == len(lines) == 34
    for fault, line in zip(faults, map(json.loads, lines), strict=True):
        row = json.loads(rows[line["row"] - 1])
        assert fault.question.text == row["instruction"]
        assert fault.question.reference == row["output"] != fault.right
        assert (fault.right, fault.kind) == (line["right"], line["kind"])


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"row": 3, "kind": "typos", "right": "x"}, "row 3 of train.jsonl is no question"),
        ({"row": 0, "kind": "typos", "right": "x"}, "row 0 of train.jsonl is no question"),
        ({"row": "1", "kind": "typos", "right": "x"}, '"row" is no whole number'),
        ({"row": True, "kind": "typos", "right": "x"}, '"row" is no whole number'),
        ({"row": 1, "kind": "typos"}, '"right" and "kind" must be text'),
        ([1], '"row" is no whole number'),
    ],
)
def test_a_line_that_is_no_fault_is_told(tmp_path, line, complaint):
    data = write_jsonl(tmp_path / "train.jsonl", [{"instruction": "a", "output": "b"}] * 2)
    with pytest.raises(DataError, match=r"faults\.jsonl row 1") as caught:
        read_faults(write_jsonl(tmp_path / "faults.jsonl", [line]), data)
    assert complaint in str(caught.value)


def test_an_empty_list_is_told(tmp_path):
    data = write_jsonl(tmp_path / "train.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(DataError, match="lists no faults"):
        read_faults(write_jsonl(tmp_path / "faults.jsonl", []), data)
