"""Grading of scores, compared with all pairs, and the second world."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.second_world.faults import KINDS
from benchmarks.second_world.write import write_second_world
from benchmarks.sort_quality import grade, roc_area


@pytest.mark.parametrize("num_values", [2, 5, 1000])
def test_the_area_is_the_share_of_pairs_in_order_and_a_tie_counts_half(num_values):
    generator = np.random.default_rng(num_values)
    faulty = generator.integers(num_values, size=17).astype(float)
    sound = generator.integers(num_values, size=40).astype(float)
    pairs = [(one > other) + (one == other) / 2 for one in faulty for other in sound]
    assert roc_area(faulty, sound) == pytest.approx(sum(pairs) / len(pairs))


def test_a_perfect_score_has_area_1_and_a_useless_one_a_half():
    assert roc_area(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1
    assert roc_area(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 0
    assert roc_area(np.ones(3), np.ones(5)) == 0.5


def test_the_interval_contains_the_area_and_narrows_with_more_rows():
    generator = np.random.default_rng(0)
    widths = []
    for number in (20, 2000):
        is_faulty_N = np.arange(number) < number // 4
        found = grade(generator.normal(size=number) + is_faulty_N, is_faulty_N, resamples=200)
        assert found.low < found.area < found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 4


def test_the_second_world_is_the_same_every_time_and_lists_each_of_its_faults(tmp_path: Path):
    first = write_second_world(tmp_path / "first")
    write_second_world(tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    rows, faults = first["field_train.jsonl"], first["field_faults.jsonl"]
    assert len(rows) >= 1000
    assert {fault["kind"] for fault in faults} == set(KINDS)
    assert len({fault["row"] for fault in faults}) == len(faults)
    for fault in faults:
        assert rows[fault["row"] - 1]["output"] != fault["right"]


def test_the_recipes_of_the_second_world_load_and_match_those_of_the_toy_world(tmp_path: Path):
    from yrunner.recipe.load import load_recipe

    write_second_world(tmp_path)
    for name, model in (("second_base", "tiny_base"), ("second_field", "legal_sft")):
        own = load_recipe(tmp_path / f"{name}.yaml")
        theirs = load_recipe(Path(__file__).parents[2] / "recipes" / f"{model}.yaml")
        assert own.tuning == theirs.tuning
        assert own.loss == theirs.loss
        assert own.model.scratch == theirs.model.scratch
        for key in ("epochs", "batch_size", "learning_rate", "warmup_ratio"):
            assert getattr(own.train, key) == getattr(theirs.train, key)


def test_each_row_of_the_second_world_has_a_question_and_an_answer(tmp_path: Path):
    write_second_world(tmp_path)
    for line in (tmp_path / "field_train.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        assert row["instruction"].strip()
        assert row["output"].strip()
