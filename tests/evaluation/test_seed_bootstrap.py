"""The paired bootstrap agrees with the slow way, and with what is known without it."""

import random
from statistics import fmean

import numpy as np
import pytest

from yrunner.evaluation.seed_bootstrap import mean_score, paired_difference


def random_scores(generator, num_seeds, sizes, chance):
    return [
        {name: (generator.random(size) < chance).astype(float).tolist() for name, size in sizes}
        for _ in range(num_seeds)
    ]


def test_groups_count_alike_whatever_their_size():
    assert mean_score({"large": [1.0] * 98 + [0.0] * 2, "small": [0.0, 0.0]}) == pytest.approx(0.49)


def test_the_mean_is_that_of_the_figures_over_the_seeds():
    first = [{"a": [0.0, 1.0], "b": [1.0]}, {"a": [0.0, 0.0], "b": [1.0]}]
    second = [{"a": [1.0, 1.0], "b": [0.0]}, {"a": [1.0, 0.0], "b": [1.0]}]
    by_hand = fmean(mean_score(b) - mean_score(a) for a, b in zip(first, second, strict=True))
    assert paired_difference(first, second).mean == pytest.approx(by_hand)
    assert by_hand == pytest.approx(0.0)


def test_what_always_differs_by_one_has_no_spread():
    difference = paired_difference([{"a": [0.0] * 9}] * 3, [{"a": [1.0] * 9}] * 3)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((1, 1, 1))
    assert not difference.is_noise


def test_the_interval_is_that_of_drawing_seeds_and_questions_one_by_one():
    generator = np.random.default_rng(3)
    sizes = [("legal", 30), ("law", 12)]
    first = random_scores(generator, 3, sizes, 0.5)
    second = random_scores(generator, 3, sizes, 0.7)
    chance = random.Random(0)
    drawn = []
    for _ in range(4000):
        seeds = chance.choices(range(3), k=3)
        groups = []
        for name, size in sizes:
            questions = chance.choices(range(size), k=size)
            groups.append(
                fmean(second[s][name][q] - first[s][name][q] for s in seeds for q in questions)
            )
        drawn.append(fmean(groups))
    slow = np.quantile(drawn, (0.025, 0.975))
    difference = paired_difference(first, second)
    assert (difference.low, difference.high) == pytest.approx(tuple(slow), abs=0.02)
    assert difference == paired_difference(first, second), "the draws are fixed"


def test_pairing_finds_a_small_difference_that_unpaired_noise_would_hide():
    generator = np.random.default_rng(1)
    easy = (generator.random(200) < 0.5).astype(float)
    better = easy.copy()
    better[np.flatnonzero(easy == 0)[:10]] = 1.0
    difference = paired_difference([{"a": easy.tolist()}], [{"a": better.tolist()}])
    assert difference.mean == pytest.approx(0.05)
    assert not difference.is_noise


def test_chance_alone_is_called_noise_in_about_nineteen_cases_of_twenty():
    generator = np.random.default_rng(2)
    noise = 0
    for _ in range(100):
        first, second = (random_scores(generator, 1, [("a", 100)], 0.5) for _ in range(2))
        noise += paired_difference(first, second).is_noise
    assert 88 <= noise <= 100
