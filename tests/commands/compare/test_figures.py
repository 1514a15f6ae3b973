"""Which points of an experiment are set against each other, and what is made of them."""

import pytest

from tests.project import answers_of
from yrunner.commands.compare.figures import (
    at_domain_accuracy,
    at_the_end,
    at_validation_loss,
    differences,
    domain_threshold,
    forgetting,
    loss_threshold,
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


def by_seed(*runs):
    return dict(enumerate(runs))


LOSSES = {
    "plain": by_seed({0: 4.0, 5: 1.0, 10: 0.25}, {0: 4.0, 5: 0.5, 10: 0.25, 15: 1.0}),
    "slow": by_seed({0: 4.0, 5: 2.0, 10: 2.0, 15: 1.0}, {0: 4.0, 5: 3.0, 10: 2.5, 15: 2.0}),
}


def where(losses, threshold):
    bases = {"plain": BASE, "slow": BASE}
    return at_validation_loss(CURVES, bases, losses, threshold, lambda point: point.figures)


def test_every_run_reaches_the_loss_that_is_the_default():
    assert loss_threshold(LOSSES) == 2.0
    assert all(len(runs) == 2 for runs in where(LOSSES, 2.0).values())


def test_at_equal_validation_loss_figures_lie_between_two_points_by_the_logarithm():
    plain, late = where(LOSSES, 0.5)["plain"].values()
    assert plain.step == pytest.approx(7.5), "0.5 is half the way from 1 to 0.25"
    assert plain.figures == pytest.approx({"domain": 0.5, "general": 0.7})
    assert (late.step, late.figures) == (5, CURVES["plain"][1][0].figures), "exactly a point"
    from_base = where(LOSSES, 2.0)["plain"][0]
    assert from_base.step == pytest.approx(2.5)
    assert from_base.figures == pytest.approx({"domain": 0.1, "general": 0.95})


def test_a_run_counts_where_its_loss_first_falls_and_is_left_out_where_it_never_does():
    chosen = where(LOSSES, 1.0)
    assert {arm: sorted(runs) for arm, runs in chosen.items()} == {"plain": [0, 1], "slow": [0]}
    assert chosen["slow"][0].step == 15
    assert chosen["plain"][1].step == pytest.approx(10 / 3), "not at its last point, where it rose"
    assert not where(LOSSES, 8.0)["plain"], "the base is better already"


def test_a_loss_of_zero_has_a_place_too():
    losses = {"plain": by_seed({0: 4.0, 5: 0.0}, {0: 4.0, 5: 0.0}), "slow": LOSSES["slow"]}
    assert where(losses, 0.0)["plain"][0].step == 5


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
