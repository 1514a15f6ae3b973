"""Orders and rules of dropping, by the scores alone."""

import random
import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yrunner.scoring.order import (
    NO_CLUSTER,
    SUSPICIOUS_WHEN_LOW,
    beyond_shares,
    choose_dropped,
    order_rows,
    suspicion,
)

SIX_SCORES = [0.5, 3.0, -1.0, 3.0, 0.5, 2.0]
some_scores = st.lists(st.floats(-5, 5), max_size=40)
order_names = st.sampled_from(["ascending", "descending", "mixed", "blocks"])


def dropped(
    kind="excess", scores=SIX_SCORES, share=0.0, above=None, below=None, keep=None, marks=None
):
    return choose_dropped(
        kind,
        scores,
        drop_share=share,
        drop_above=above,
        drop_below=below,
        keep=keep,
        marks=marks or {},
    )


def indices(*args, **kwargs):
    return [row.index for row in dropped(*args, **kwargs)]


def farthest_mean(order: list[int], width: int) -> float:
    """Largest deviation of a window's mean rank from that of all, as a share of all ranks."""
    middle = (len(order) - 1) / 2
    windows = (order[start : start + width] for start in range(len(order) - width + 1))
    return max(abs(statistics.fmean(window) - middle) for window in windows) / len(order)


@given(some_scores, order_names, st.integers(0, 5), st.integers(1, 7))
def test_every_row_is_written_once_and_a_seed_repeats_its_order(scores, order, seed, blocks):
    found = order_rows(scores, order, seed=seed, blocks=blocks)
    assert sorted(found) == list(range(len(scores)))
    assert found == order_rows(scores, order, seed=seed, blocks=blocks)


def test_equal_scores_keep_the_order_of_the_file_both_ways():
    assert order_rows(SIX_SCORES, "ascending", seed=0, blocks=1) == [2, 0, 4, 5, 1, 3]
    assert order_rows(SIX_SCORES, "descending", seed=0, blocks=1) == [1, 3, 5, 0, 4, 2]


@pytest.mark.parametrize("number", [50, 1000, 4001])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_stretch_of_a_mixed_corpus_has_nearly_the_same_mean_rank(number: int, seed: int):
    order = order_rows([float(rank) for rank in range(number)], "mixed", seed=seed, blocks=1)
    for width in (4, 10, 30):
        assert farthest_mean(order, width) < 1.25 / width


def test_a_mixed_corpus_is_more_even_than_a_shuffled_one():
    mixed = order_rows([float(rank) for rank in range(1000)], "mixed", seed=0, blocks=1)
    shuffled = random.Random(0).sample(range(1000), 1000)
    assert farthest_mean(mixed, 30) < farthest_mean(shuffled, 30) / 3


def test_every_stretch_of_a_mixed_corpus_has_rows_of_every_quarter():
    order = order_rows([float(rank) for rank in range(1000)], "mixed", seed=0, blocks=1)
    for start in range(1000 - 16):
        quarters = [rank // 250 for rank in order[start : start + 16]]
        assert {quarters.count(quarter) for quarter in range(4)} <= {2, 3, 4, 5, 6}


def test_seeds_choose_different_mixed_orders():
    orders = [order_rows(list(range(100)), "mixed", seed=seed, blocks=1) for seed in range(5)]
    neighbours = [set(pairwise(order)) for order in orders]
    assert len(neighbours[0] & neighbours[1]) < 50
    assert len({tuple(order) for order in orders}) == 5


def test_blocks_go_from_easy_to_hard_and_are_mixed_inside():
    scores = [float(rank) for rank in random.Random(0).sample(range(403), 403)]
    found = [scores[index] for index in order_rows(scores, "blocks", seed=3, blocks=4)]
    parts = [found[403 * part // 4 : 403 * (part + 1) // 4] for part in range(4)]
    assert [len(part) for part in parts] == [100, 101, 101, 101]
    for before, after in pairwise(parts):
        assert max(before) < min(after)
    for part in parts:
        ranks = [sorted(part).index(score) for score in part]
        assert farthest_mean(ranks, 10) < 1.25 / 10


def test_one_block_is_mixed_and_a_block_per_row_ascending():
    scores = [3.0, 1.0, 2.0]
    mixed = order_rows(scores, "mixed", seed=7, blocks=9)
    assert order_rows(scores, "blocks", seed=7, blocks=1) == mixed
    assert order_rows(scores, "blocks", seed=7, blocks=3) == [1, 2, 0]


def test_without_a_rule_nothing_is_dropped():
    assert dropped() == []
    assert dropped(keep=6) == []
    assert dropped(scores=[], share=0.5, above=1.0, keep=1) == []


def test_each_rule_drops_the_most_suspicious_first():
    assert indices(above=0.5) == [1, 3, 5]
    assert indices(below=0.5) == [2]
    assert indices(share=1 / 3) == [1, 3]
    assert indices(keep=2) == [1, 3, 5, 0]


def test_of_similarity_the_lowest_are_the_most_suspicious():
    assert indices("similarity", share=0.5) == [2, 0, 4]
    assert indices("similarity", keep=5) == [2]


def test_rules_combine_and_the_first_that_holds_is_the_reason():
    rows = dropped(above=2.5, below=0, share=0.5, keep=1)
    assert [(row.index, row.reason) for row in rows] == [
        (1, "excess 3 is above 2.5 (sort.drop_above)"),
        (3, "excess 3 is above 2.5 (sort.drop_above)"),
        (5, "excess 2 is among the 50 % most suspicious (sort.drop_share)"),
        (0, "excess 0.5 is not among the 1 least suspicious (sort.keep)"),
        (2, "excess -1 is below 0 (sort.drop_below)"),
    ]


@given(some_scores, st.floats(0, 0.99), st.none() | st.integers(1, 50))
def test_share_and_keep_are_met_exactly(scores, share, keep):
    remaining = len(scores) - round(share * len(scores))
    expected = remaining if keep is None else min(keep, remaining)
    assert len(scores) - len(dropped(scores=scores, share=share, keep=keep)) == expected


@given(some_scores, st.sampled_from(["loss", "correlation"]), st.floats(0, 0.99))
def test_no_dropped_row_is_less_suspicious_than_one_that_stays(scores, kind, share):
    gone = indices(kind, scores, share=share)
    stay = [score for index, score in enumerate(scores) if index not in gone]
    if gone and stay:
        left = [scores[index] for index in gone]
        assert min(left) >= max(stay) if kind == "loss" else max(left) <= min(stay)


def test_a_mark_overrides_every_rule():
    scores = [0.1, 5.0, 3.0, 4.0, 0.2]
    assert indices("loss", scores, marks={0: "drop"}) == [0]
    assert indices("loss", scores, above=2.5, marks={1: "keep"}) == [3, 2]
    assert indices("loss", scores, keep=2, marks={1: "keep", 4: "drop"}) == [3, 4]
    (row,) = dropped("loss", scores, marks={4: "drop", 1: "keep"})
    assert row.reason == "loss 0.2 is marked drop (sort.marks)"


def test_no_row_is_dropped_in_the_place_of_one_that_is_marked_keep():
    scores = [float(row) for row in range(10)]
    assert indices("loss", scores, share=0.3) == [9, 8, 7]
    assert indices("loss", scores, share=0.3, marks={8: "keep", 0: "drop"}) == [9, 7, 0]


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3)), max_size=30),
    st.dictionaries(st.integers(0, 3), st.floats(0, 1), max_size=4),
)
def test_of_each_cluster_the_least_suspicious_share_stays(rows, shares):
    suspicions, clusters = [row[0] for row in rows], [row[1] for row in rows]
    gone = beyond_shares(suspicions, clusters, shares)
    for number in range(4):
        members = [index for index in range(len(rows)) if clusters[index] == number]
        kept = [index for index in members if index not in gone]
        share = shares.get(number, 1.0)
        assert len(kept) == (max(share > 0, round(share * len(members))) if members else 0)
        worst = max((suspicions[index] for index in kept), default=None)
        others = [suspicions[index] for index in members if index in gone]
        assert worst is None or all(value >= worst for value in others)


def test_a_share_of_each_cluster_is_a_rule_among_the_others():
    found = choose_dropped(
        "loss",
        [5.0, 1.0, 4.0, 3.0, 2.0, 9.0],
        drop_share=0.0,
        drop_above=4.5,
        drop_below=None,
        keep=None,
        marks={2: "keep"},
        clusters=[1, 1, 1, 1, 2, NO_CLUSTER],
        keep_of_each=0.5,
    )
    assert {row.index: row.reason.split(" ", 2)[2] for row in found} == {
        5: "is above 4.5 (sort.drop_above)",
        0: "is above 4.5 (sort.drop_above)",  # counts as one of the two that are too many
    }


def test_low_is_suspicious_of_the_scores_that_measure_agreement():
    assert SUSPICIOUS_WHEN_LOW == {"similarity", "correlation", "margin"}
    assert suspicion("correlation", 0.25) == -0.25
    assert suspicion("excess", 0.25) == 0.25
