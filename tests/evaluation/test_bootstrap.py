"""Intervals of differences: against chance that is known, and the slow way."""

import random
from statistics import fmean

import numpy as np
import pytest

from yrunner.evaluation.results import interval_of_means


def random_scores(generator, num_seeds, num_questions, chance):
    return [
        (generator.random(num_questions) < chance).astype(float).tolist() for _ in range(num_seeds)
    ]


def paired(before, after):
    """The interval of one task with one seed."""
    return interval_of_means([[(before, after)]])


def test_a_difference_that_every_question_has_is_certain():
    low, high = paired([0.0, 0.5, 1.0], [0.25, 0.75, 1.25])
    assert low == high == pytest.approx(0.25)


def test_the_interval_is_about_two_standard_errors_to_each_side():
    chance = random.Random(0)
    before = [float(chance.random() < 0.5) for _ in range(400)]
    after = [float(chance.random() < 0.7) for _ in range(400)]
    change = np.array(after) - np.array(before)
    error = change.std() / 20
    low, high = paired(before, after)
    assert low == pytest.approx(change.mean() - 1.96 * error, abs=0.01)
    assert high == pytest.approx(change.mean() + 1.96 * error, abs=0.01)


def test_the_interval_is_that_of_drawing_seeds_and_questions_one_by_one():
    generator = np.random.default_rng(3)
    sizes = [30, 12]
    first, second = ([random_scores(generator, 3, size, p) for size in sizes] for p in (0.5, 0.7))
    tasks = [list(zip(*both, strict=True)) for both in zip(first, second, strict=True)]
    chance = random.Random(0)
    drawn = []
    for _ in range(4000):
        seeds = chance.choices(range(3), k=3)
        means = []
        for number, size in enumerate(sizes):
            questions = chance.choices(range(size), k=size)
            means.append(
                fmean(second[number][s][q] - first[number][s][q] for s in seeds for q in questions)
            )
        drawn.append(fmean(means))
    slow = np.quantile(drawn, (0.025, 0.975))
    assert interval_of_means(tasks) == pytest.approx(tuple(slow), abs=0.02)


def test_pairing_takes_out_how_hard_the_questions_are():
    hard = [float(number % 2) for number in range(100)]
    better = [value + (0.1 if number % 3 else 0.0) for number, value in enumerate(hard)]
    low, high = paired(hard, better)
    assert 0 < low < high < 0.1


def test_chance_alone_is_inside_the_interval_in_about_nineteen_cases_of_twenty():
    generator = np.random.default_rng(2)
    noise = 0
    for _ in range(100):
        low, high = paired(*random_scores(generator, 2, 100, 0.5))
        noise += low <= 0 <= high
    assert 88 <= noise <= 100


def test_the_same_seed_gives_the_same_interval():
    tasks = [[([0.0, 0.31, 0.17, 1.0, 0.4], [0.77, 1.0, 0.0, 0.9, 0.03])]]
    assert interval_of_means(tasks, seed=3) == interval_of_means(tasks, seed=3)
    assert interval_of_means(tasks, seed=3) != interval_of_means(tasks, seed=4)


def test_tasks_count_alike_however_many_questions_they_have():
    certain = [([0.0] * 3, [1.0] * 3)]
    none = [([0.0] * 300, [0.0] * 300)]
    assert interval_of_means([certain, none]) == pytest.approx((0.5, 0.5))
