"""Rows that repeat or contradict each other are found, as comparing all of them would find them."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_jsonl
from yrunner.data.dataset.cache import Cache
from yrunner.data.dataset.examples import Examples
from yrunner.data.dataset.prepare import Rules, Source, prepare
from yrunner.data.dataset.quality import LEAST_LIKENESS, count_common_start, find_pairs

WORDS = "lamp harbour net rope sail key tin brass scale dock mast tide fog oar crew keel".split()


@pytest.fixture
def prepare_rows(tmp_path: Path, capitals_tokenizer: Any):
    """A function that makes examples of questions and answers."""

    def make(rows: list[tuple[str, str]]) -> Examples:
        content = [{"instruction": question, "output": answer} for question, answer in rows]
        source = Source((write_jsonl(tmp_path / "train.jsonl", content),))
        rules = Rules(max_length=400)
        return prepare([source], capitals_tokenizer, rules, Cache(tmp_path / "cache")).train

    return make


def sentence(number: int) -> str:
    return " ".join(WORDS[(number * 7 + place * (number + 3)) % len(WORDS)] for place in range(12))


def test_every_other_answer_to_a_prompt_and_every_repeat_is_paired_with_the_first(prepare_rows):
    examples = prepare_rows(
        [
            ("Capital of Aru?", "Belo"),
            ("Capital of Coria?", "Dane"),
            ("Capital of Aru?", "Fane"),
            ("Capital of Aru?", "Belo"),
            ("Capital of Aru?", "Fane"),
            ("Capital of Aru?", "Hulm"),
        ]
    )
    pairs = {(pair.kind, pair.first, pair.second) for pair in find_pairs(examples)}
    assert {pair for pair in pairs if pair[0] == "conflict"} == {
        ("conflict", 0, 2),
        ("conflict", 0, 5),
    }
    assert {pair for pair in pairs if pair[0] == "duplicate"} == {
        ("duplicate", 0, 3),
        ("duplicate", 2, 4),
    }


def test_near_duplicates_are_those_that_share_most_of_their_shingles(prepare_rows):
    rows = [(f"Question {number}?", sentence(number)) for number in range(30)]
    rows += [(f"Question {number}!", f"{sentence(number)} now") for number in range(0, 30, 3)]
    examples = prepare_rows(rows)
    start = count_common_start(examples)

    def likeness(one: int, other: int) -> float:
        sets = []
        for row in (one, other):
            ids = examples[row].input_ids[start:]
            sets.append({tuple(ids[place : place + 3]) for place in range(len(ids) - 2)})
        return len(sets[0] & sets[1]) / len(sets[0] | sets[1])

    all_pairs = combinations(range(len(rows)), 2)
    expected = {pair for pair in all_pairs if likeness(*pair) >= LEAST_LIKENESS}
    found = {(pair.first, pair.second): pair.likeness for pair in find_pairs(examples)}
    assert len(expected) >= 5
    assert set(found) <= expected
    assert len(found) >= 0.7 * len(expected)
    for pair, value in found.items():
        assert value == pytest.approx(likeness(*pair))
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_what_all_rows_begin_with_is_counted_once_and_likens_nothing(prepare_rows):
    examples = prepare_rows([(f"{'the same words ' * 20}{n}", sentence(n)) for n in range(4)])
    first = [example.input_ids for example in examples]
    start = count_common_start(examples)
    assert all(ids[:start] == first[0][:start] for ids in first)
    assert len({ids[start] for ids in first}) > 1
    assert find_pairs(examples) == []


def test_no_rows_and_the_shortest_rows_have_no_pairs(prepare_rows):
    assert find_pairs(Examples.of([])) == []
    assert find_pairs(prepare_rows([("a", "b"), ("c", "d")])) == []
