"""The number of sound rows among the worst, on scores whose sound rows are known."""

import numpy as np
import pytest

from yrunner.scoring.sound_share import FEWEST_ROWS, SHAPE, expect_sound


def draw(num_sound, num_faulty, seed, far=3.0, shape=SHAPE):
    """Scores of sound rows, then of faulty ones, which are `far` deviations higher."""
    generator = np.random.default_rng(seed)
    sound = generator.gamma(shape, 0.1, num_sound)
    return sound, generator.gamma(shape, 0.1, num_faulty) + far * 0.1 * np.sqrt(shape)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_faulty", [0, 20, 60])
def test_about_as_many_are_expected_as_there_are(num_faulty, seed):
    sound, faulty = draw(1000 - num_faulty, num_faulty, seed)
    scores = [*sound, *faulty]
    border = np.sort(scores)[-100]
    found = expect_sound(scores, 100)
    assert abs(found - (sound >= border).sum()) <= 20


def test_where_all_rows_are_sound_nearly_all_of_the_worst_are():
    found = [expect_sound(draw(500, 0, seed)[0], 50) for seed in range(10)]
    assert np.mean(found) > 40


def test_where_faults_stand_far_out_few_of_the_worst_are_sound():
    scores = np.concatenate(draw(450, 50, seed=1, far=12))
    assert expect_sound(scores, 50) <= 2


def test_skewed_scores_of_another_shape_still_give_the_right_size():
    for shape in (2.0, 5.0):
        sound, faulty = draw(450, 50, seed=2, far=3, shape=shape)
        border = np.sort([*sound, *faulty])[-50]
        assert abs(expect_sound([*sound, *faulty], 50) - (sound >= border).sum()) <= 20


def test_rows_that_are_all_alike_are_all_sound():
    assert expect_sound([0.5] * 200, 20) == 20


@pytest.mark.parametrize(("rows", "number"), [(FEWEST_ROWS - 1, 5), (100, 0), (100, 101), (0, 0)])
def test_too_few_rows_have_no_estimate(rows, number):
    assert expect_sound([float(row) for row in range(rows)], number) is None


def test_the_estimate_moves_with_the_scores():
    """Its place and unit do not matter."""
    scores = np.concatenate(draw(300, 30, seed=5))
    assert expect_sound(scores, 30) == expect_sound(7 * scores - 3, 30)
