"""Folds: equal in size, the same every time, copies together."""

import random
from collections import Counter

import pytest

from yrunner.commands.sort.cross_fit import group_copies, make_folds
from yrunner.errors import YRunnerError


@pytest.mark.parametrize(("num_rows", "num_folds"), [(2, 2), (9, 3), (10, 3), (11, 3), (100, 7)])
def test_every_row_has_a_fold_and_no_fold_is_two_rows_larger_than_another(num_rows, num_folds):
    sizes = Counter(make_folds(range(num_rows), num_folds, seed=0))
    assert set(sizes) == set(range(num_folds))
    assert max(sizes.values()) - min(sizes.values()) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_copies_share_a_fold_and_the_sizes_stay_near(seed):
    draw = random.Random(seed)
    groups = [draw.choice([draw.randrange(40), 1000 + row]) for row in range(300)]
    folds = make_folds(groups, 3, seed)
    assert len(set(zip(groups, folds, strict=True))) == len(set(groups))
    sizes = Counter(folds).values()
    assert max(sizes) - min(sizes) <= 1


def test_a_group_larger_than_a_fold_stays_whole():
    folds = make_folds(["copy"] * 8 + ["other", "third"], 2, seed=0)
    assert len(set(folds[:8])) == 1
    assert folds[8] == folds[9] != folds[0]


def test_the_same_seed_gives_the_same_folds_and_another_one_others():
    assert make_folds(range(60), 3, seed=1) == make_folds(range(60), 3, seed=1)
    assert make_folds(range(60), 3, seed=1) != make_folds(range(60), 3, seed=2)


def test_neighbours_are_spread_over_the_folds():
    folds = make_folds(range(300), 3, seed=0)
    assert all(len(set(folds[start : start + 30])) == 3 for start in range(0, 300, 30))


def test_fewer_different_rows_than_folds_are_refused_with_a_way_out():
    with pytest.raises(YRunnerError) as caught:
        make_folds([5, 5, 6, 6], 3, seed=0)
    assert str(caught.value) == (
        "3 folds need 3 different rows; there are 2. Set sort.cross_fit to 0, or add rows"
    )


def test_parts_of_a_row_and_of_its_copies_are_one_group():
    rows = ["a", "a", "b", "c", "c", "d"]
    groups = group_copies(rows, ["1", "2", "1", "1", "2", "3"])
    assert groups[0] == groups[1] == groups[3] == groups[4]
    assert len(set(groups)) == 3
