"""Repetition, variety and density, counted by hand."""

from collections import Counter

import pytest

from yrunner.evaluation.text_metrics import (
    density,
    distinct,
    repetition,
    text_quality,
    windowed_repetition,
)


def repetition_of_the_seed(tokens, n=4):
    """As the article defines it from which the measure comes."""
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    counts = Counter(ngrams)
    total = len(ngrams)
    repeated = sum(c for c in counts.values() if c > 1)
    return repeated / total if total > 0 else 0


def test_repetition_is_the_share_of_ngrams_that_occur_more_than_once():
    # abc bca cab abc: abc twice of four.
    assert repetition(list("abcabc"), 3) == pytest.approx(2 / 4)
    assert repetition(list("abcdef"), 3) == 0
    assert repetition(list("ab"), 3) == 0


@pytest.mark.parametrize("text", ["", "abc", "abcabcab", "aaaaaaa", "更独立，更独立，更独立"])
@pytest.mark.parametrize("size", [3, 4])
def test_repetition_reproduces_its_source(text, size):
    assert repetition(list(text), size) == pytest.approx(repetition_of_the_seed(list(text), size))


def test_a_near_repeat_weighs_more_than_a_far_one_and_one_beyond_the_window_nothing():
    stuck = windowed_repetition(["a"] * 13, size=4, window=50)
    assert stuck == pytest.approx(9 / 10), "all of the ten n-grams but the first"
    far = ["a", "b", "c", "d", *map(str, range(20)), "a", "b", "c", "d"]
    # One of 25 n-grams comes back, at a distance of 24.
    assert windowed_repetition(far, size=4, window=50) == pytest.approx((1 - 23 / 50) / 25)
    assert windowed_repetition(far, size=4, window=23) == 0
    assert windowed_repetition([], size=4) == 0


def test_distinct_is_the_share_of_different_ngrams():
    assert distinct(list("aab"), 1) == pytest.approx(2 / 3)
    assert distinct(list("abab"), 2) == pytest.approx(2 / 3)
    assert distinct([], 2) == 1


def test_density_falls_where_nothing_new_is_said():
    assert density("更独立，" * 100) < 0.05
    assert density("So say what is new, with other words each time.") > 0.9
    assert density("") == 1


def test_length_counts_words_and_characters():
    assert text_quality("I say 你好。")["length"] == 5
