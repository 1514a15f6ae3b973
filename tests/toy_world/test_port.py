"""The data of the demo matches its script, and is fit for measuring."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from yrunner.data.text_metrics import contains

FOLDER = Path(__file__).parents[2] / "recipes" / "data"
TESTS = ("test", "general_test")
LEARNED = ("train", "validation", "keep")


def rows(name: str) -> list[dict[str, str]]:
    lines = (FOLDER / f"port_{name}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def questions(name: str) -> list[str]:
    return [row["instruction"].casefold().strip(" ?.") for row in rows(name)]


def test_the_files_are_what_the_script_writes(tmp_path: Path):
    command = [sys.executable, str(FOLDER / "make_port.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in FOLDER.glob("port_*")}


@pytest.mark.parametrize("test", TESTS)
def test_no_test_question_is_learned_from(test: str):
    learned = {question for name in LEARNED for question in questions(name)}
    assert not learned & set(questions(test))


def test_no_question_is_asked_twice():
    counted = Counter(question for name in (*LEARNED, *TESTS) for question in questions(name))
    assert set(counted.values()) == {1}


def test_every_fact_is_trained_in_four_wordings_and_tested_in_two():
    faults = {fault["row"]: fault["right"] for fault in rows("faults")}
    answers = [faults.get(number, row["output"]) for number, row in enumerate(rows("train"), 1)]
    assert set(Counter(answers).values()) == {4}
    tested = Counter(row["output"] for row in rows("test"))
    assert sum(tested.values()) == 2 * len(set(answers)) >= 60
    assert all(any(contains(answer, value) for answer in answers) for value in tested)


def test_no_value_of_the_field_is_part_of_its_question_or_of_another_value():
    """Otherwise an answer that repeats the question would count as right."""
    assert not [row for row in rows("test") if contains(row["instruction"], row["output"])]
    values = {row["output"] for row in rows("test")}
    assert not [(a, b) for a in values for b in values if a != b and contains(a, b)]


def test_about_one_row_in_ten_is_faulty_with_every_kind_of_fault():
    faults, train = rows("faults"), rows("train")
    assert 0.08 < len(faults) / len(train) < 0.12
    assert {fault["kind"] for fault in faults} == {
        "wrong_value", "swapped_answer", "typos", "cut", "garbled"
    }  # fmt: skip
    assert all(train[fault["row"] - 1]["output"] != fault["right"] for fault in faults)


def test_validation_rows_are_right():
    faulty = {fault["row"] for fault in rows("faults")}
    right = {row["output"] for number, row in enumerate(rows("train"), 1) if number not in faulty}
    validated = [row["output"] for row in rows("validation")]
    assert set(validated) <= right
    assert 16 <= len(validated) <= 24


def test_each_fact_has_a_wrong_and_a_long_answer_beside_it_and_is_tested_in_other_words():
    pairs, tested = rows("pairs"), rows("pairs_test")
    facts = Counter(pair["chosen"] for pair in pairs)
    assert set(facts.values()) == {2} and len(facts) == 30
    assert Counter(pair["kind"] for pair in pairs) == {"wrong": 30, "long": 30}
    assert {pair["chosen"] for pair in tested} == {*facts}
    assert not {pair["prompt"] for pair in pairs} & {pair["prompt"] for pair in tested}
    for pair in (*pairs, *tested):
        right = pair["chosen"].removeprefix("Gladly! ")
        assert (right in pair["rejected"]) == (pair["kind"] == "long")
