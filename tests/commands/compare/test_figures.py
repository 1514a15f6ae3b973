"""Which points of an experiment are set against each other, and what is made of them."""

import pytest

from tests.project import answers_of
from yrunner.commands.compare.figures import (
    at_domain_accuracy,
    at_the_end,
    differences,
    domain_threshold,
    forgetting,
    measure_spread,
)
from yrunner.commands.compare.points import Point
from yrunner.evaluation.results import ModelResults


def point(step, domain, general=0.0):
    """A point that has answered so many of ten questions of each side."""
    answered = {"domain": domain, "general": general}
    tasks = {
        side: answers_of(side, [float(n < right * 10) for n in range(10)])
        for side, right in answered.items()
    }
    return Point(step, ModelResults("it", tasks))


CURVES = {
    "plain": {
        0: (point(5, 0.2, 0.9), point(10, 0.8, 0.5), point(15, 0.7, 0.4)),
        1: (point(5, 0.6, 0.8), point(10, 1.0, 0.6), point(15, 1.0, 0.2)),
    },
    "slow": {
        0: (point(5, 0.1, 1.0), point(10, 0.3, 0.9), point(15, 0.5, 0.8)),
        1: (point(5, 0.1, 1.0), point(10, 0.3, 0.9), point(15, 0.9, 0.7)),
    },
}
BASE = point(0, 0.0, 1.0)


def test_at_the_end_every_run_is_at_its_last_point():
    chosen = at_the_end(CURVES)
    assert [point.step for runs in chosen.values() for point in runs.values()] == [15] * 4


def test_the_threshold_is_nine_tenths_of_the_best_arms_best_points():
    assert domain_threshold(CURVES) == pytest.approx(0.9 * (0.8 + 1.0) / 2)


def test_at_equal_domain_accuracy_a_run_is_at_its_first_point_that_reaches_it():
    chosen = at_domain_accuracy(CURVES, 0.6)
    steps = {
        arm: {seed: point.step for seed, point in runs.items()} for arm, runs in chosen.items()
    }
    assert steps == {"plain": {0: 10, 1: 5}, "slow": {1: 15}}


def test_spread_is_the_sample_deviation_over_the_seeds_and_none_for_one():
    both = measure_spread(at_the_end(CURVES)["plain"], "domain")
    assert (both.mean, both.deviation) == pytest.approx((0.85, 0.15 * 2**0.5))
    alone = measure_spread(at_domain_accuracy(CURVES, 0.6)["slow"], "domain")
    assert (alone.mean, alone.deviation) == (pytest.approx(0.9), None)
    assert measure_spread({}, "domain") is None


def test_forgetting_is_the_general_side_minus_that_of_the_base():
    assert forgetting(at_the_end(CURVES)["plain"], BASE).mean == pytest.approx(0.3 - 1.0)


def test_differences_are_paired_by_the_seeds_that_both_arms_have():
    chosen = at_domain_accuracy(CURVES, 0.6)
    difference = differences(chosen, "general")["slow"]
    assert difference.value == pytest.approx(0.7 - 0.8), "of seed 1, the only one of both"
    assert differences(at_domain_accuracy(CURVES, 0.95), "general") == {"slow": None}
