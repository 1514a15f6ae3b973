"""Intervals of differences: against chance that is known."""

import random

import numpy as np
import pytest

from yrunner.evaluation.bootstrap import interval_of_means, paired_interval


def test_a_difference_that_every_question_has_is_certain():
    low, high = paired_interval([0.0, 0.5, 1.0], [0.25, 0.75, 1.25])
    assert low == high == pytest.approx(0.25)


def test_the_interval_is_about_two_standard_errors_to_each_side():
    chance = random.Random(0)
    before = [float(chance.random() < 0.5) for _ in range(400)]
    after = [float(chance.random() < 0.7) for _ in range(400)]
    change = np.array(after) - np.array(before)
    error = change.std() / 20
    low, high = paired_interval(before, after, resamples=4000)
    assert low == pytest.approx(change.mean() - 1.96 * error, abs=0.01)
    assert high == pytest.approx(change.mean() + 1.96 * error, abs=0.01)


def test_pairing_takes_out_how_hard_the_questions_are():
    hard = [float(number % 2) for number in range(100)]
    better = [value + (0.1 if number % 3 else 0.0) for number, value in enumerate(hard)]
    low, high = paired_interval(hard, better)
    assert 0 < low < high < 0.1


def test_the_same_seed_gives_the_same_interval():
    values = ([0.0, 0.31, 0.17, 1.0, 0.4], [0.77, 1.0, 0.0, 0.9, 0.03])
    assert paired_interval(*values, seed=3) == paired_interval(*values, seed=3)
    assert paired_interval(*values, seed=3) != paired_interval(*values, seed=4)


def test_tasks_count_alike_however_many_questions_they_have():
    certain = ([0.0] * 3, [1.0] * 3)
    none = ([0.0] * 300, [0.0] * 300)
    assert interval_of_means([certain, none]) == pytest.approx((0.5, 0.5))
