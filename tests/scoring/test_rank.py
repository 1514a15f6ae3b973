"""Scores against their formulas, for every row there can be; orders; rules that drop rows."""

import math
import random
import statistics
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from yrunner.recipe.schema.sort import ScoreName
from yrunner.scoring.rank import (
    KNN_SCORES,
    MARGIN,
    SCORES,
    SUSPICIOUS_WHEN_LOW,
    Neighbourhood,
    choose_dropped,
    order_rows,
    outlier_targets,
    score_row,
    suspicion,
)

LOSSES, ENTROPIES = [0.5, 4.0, 3.5, 0.1, 2.0], [0.6, 0.2, 2.5, 0.3, 1.0]
figures = st.one_of(
    st.floats(0, 20, width=32), st.sampled_from([0.0, 1e-30, 80.0, math.inf, math.nan])
)
rows = st.lists(st.tuples(figures, figures), max_size=12)


def score(kind: str, losses: list[float], entropies: list[float]) -> float:
    return SCORES[kind](torch.tensor(losses), torch.tensor(entropies))


def published_correlation(losses: list[float], entropies: list[float]) -> float:
    """Both centred and divided by their deviation, then their cosine; with numpy, as published."""
    loss_N, entropy_N = (
        (figure_N - figure_N.mean()) / figure_N.std()
        for figure_N in (np.array(losses), np.array(entropies))
    )
    lengths = np.linalg.norm(loss_N) * np.linalg.norm(entropy_N)
    return float(loss_N @ entropy_N / lengths)


def test_every_score_is_its_formula():
    length = math.sqrt(sum(one**2 for one in LOSSES)) * math.sqrt(sum(one**2 for one in ENTROPIES))
    expected = {
        "similarity": sum(a * b for a, b in zip(LOSSES, ENTROPIES, strict=True)) / length,
        "correlation": statistics.correlation(LOSSES, ENTROPIES),
        "surprise": 1 + 0.5,
        "loss": statistics.mean(LOSSES),
        "perplexity": math.exp(statistics.mean(LOSSES)),
        "entropy": statistics.mean(ENTROPIES),
        "excess": statistics.mean(LOSSES) - statistics.mean(ENTROPIES),
    }
    found = score_row(torch.tensor(LOSSES), torch.tensor(ENTROPIES), expected)
    assert list(found) == list(expected)
    assert found == pytest.approx(expected)


def test_correlation_orders_rows_as_the_published_code_does():
    generator = torch.Generator().manual_seed(0)
    ours, published = [], []
    for length in torch.randint(8, 200, (64,), generator=generator).tolist():
        loss_N, entropy_N = 4 * torch.rand(2, length, generator=generator)
        ours.append(SCORES["correlation"](loss_N, loss_N + entropy_N))
        published.append(published_correlation(loss_N.tolist(), (loss_N + entropy_N).tolist()))
    assert ours == pytest.approx(published, abs=1e-6)
    assert np.argsort(ours).tolist() == np.argsort(published).tolist()


@given(rows)
def test_no_row_has_a_score_that_is_not_a_finite_number(row: list[tuple[float, float]]):
    pairs_N2 = torch.tensor(row, dtype=torch.float32).reshape(-1, 2)
    found = score_row(pairs_N2[:, 0], pairs_N2[:, 1], SCORES)
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())
    assert -1 <= found["similarity"] <= 1 and -1 <= found["correlation"] <= 1
    assert 0 <= found["surprise"] <= len(row) and found["divergence"] >= 0


@pytest.mark.parametrize(
    ("kind", "empty", "one_token", "constant_loss", "mastered"),
    [
        ("similarity", 1, 1, 3 / math.sqrt(10), 1),
        ("correlation", 1, 1, 1, 1),
        ("surprise", 0, 1, 0, 0),
        ("loss", 0, 12, 2, 0),
        ("perplexity", 1, math.exp(12), math.exp(2), 1),
        ("entropy", 0, 0.5, 1.5, 0),
        ("excess", 0, 11.5, 0.5, 0),
        ("divergence", 0, 0, 0, 0),
    ],
)
def test_a_row_without_evidence_is_not_suspicious(
    kind: str, empty: float, one_token: float, constant_loss: float, mastered: float
):
    assert score(kind, [], []) == empty
    assert score(kind, [12.0], [0.5]) == pytest.approx(one_token)
    assert score(kind, [2.0, 2.0], [1.0, 2.0]) == pytest.approx(constant_loss)
    assert score(kind, [0.0, 0.0], [0.0, 1e-7]) == pytest.approx(mastered, abs=1e-6)


def test_rounding_of_a_constant_loss_is_ignored():
    losses = [0.3, 0.1 + 0.2, 0.3, 0.3]
    loss_N = torch.tensor(losses, dtype=torch.float64)
    assert SCORES["correlation"](loss_N, torch.tensor([1.0, 0.0, 1.0, 1.0])) == 1


def test_unexplained_is_the_largest_of_the_smaller_losses():
    by_model, by_neighbours = [9.0, 0.5, 4.0, 2.0], [0.1, 7.0, 3.5, 2.5]
    near = Neighbourhood(torch.tensor(by_neighbours), torch.zeros(4))
    found = score_row(torch.tensor(by_model), None, ["unexplained"], near)
    assert found == {"unexplained": max(min(0.1, 9.0), min(0.5, 7.0), min(4.0, 3.5), 2.0)}


@pytest.mark.parametrize(
    ("knn_losses", "weight"),
    [([2.0, 1.0], 0.5), ([6.0, 0.0], 1.0), ([9.0, 9.0], 1.0), ([0.0, 0.0], 0)],
)
def test_the_model_counts_in_an_outlier_as_much_as_neighbours_leave_unexplained(knn_losses, weight):
    by_model, by_neighbours = [3.0, -0.5], [1.0, 0.5]
    found = outlier_targets(
        *([torch.tensor(figures)] for figures in (by_model, by_neighbours, [4.0, 2.0], knn_losses))
    )
    expected = [
        (near + weight * own) / (1 + weight)
        for own, near in zip(by_model, by_neighbours, strict=True)
    ]
    assert found[0].tolist() == pytest.approx(expected)
    near = Neighbourhood(torch.zeros(2), found[0])
    score = score_row(torch.zeros(2), None, ["outlier"], near)["outlier"]
    assert score == pytest.approx(statistics.fmean(expected))
    assert score_row(torch.zeros(2), None, ["outlier"], None) == {}


def test_rows_without_losses_have_outliers_all_the_same():
    nothing = [torch.empty(0)]
    assert outlier_targets(nothing, nothing, nothing, nothing)[0].shape == (0,)
    zero = [torch.zeros(2)]
    assert outlier_targets(zero, zero, zero, zero)[0].tolist() == [0, 0]


@given(st.lists(st.tuples(figures, figures), max_size=12))
def test_knn_scores_are_finite_and_zero_for_a_row_without_targets(row):
    loss_N, knn_loss_N = torch.tensor(row, dtype=torch.float32).reshape(-1, 2).T
    near = Neighbourhood(knn_loss_N, torch.zeros(len(knn_loss_N)))
    found = score_row(loss_N, loss_N, KNN_SCORES, near)
    assert list(found) == [*KNN_SCORES]
    assert all(math.isfinite(value) and value >= 0 for value in found.values())
    assert row or set(found.values()) == {0.0}


def test_errors_without_any_doubt_are_the_least_similar():
    assert score("similarity", [9.0, 0.1], [0.0, 0.0]) == 0


def test_a_surprise_is_above_3_and_counts_half_where_the_model_doubted():
    assert score("surprise", [3.0], [0.0]) == 0
    assert score("surprise", [3.1], [0.9]) == 1
    assert score("surprise", [3.1], [1.0]) == 0.5


@pytest.mark.parametrize("kind", ["loss", "excess", "surprise", "perplexity"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_the_most_suspicious(kind: str, bad: float):
    assert score(kind, [1.0, bad], [1.0, math.nan]) >= score(kind, [1.0, 90.0], [1.0, 0.0])


@pytest.mark.parametrize("kind", SCORES)
def test_a_row_that_is_sure_and_wrong_is_more_suspicious_in_every_score_but_entropy(kind: str):
    # Doubt and loss go together in the first; in the second the model is sure where it errs.
    entropies = [0.2, 0.2, 0.2, 3.0, 3.0, 3.0, 0.2, 0.2, 0.2]
    sound = [0.1, 0.1, 0.1, 3.0, 3.0, 3.0, 0.1, 0.1, 0.1]
    wrong = [0.1, 0.1, 0.1, 3.0, 3.0, 3.0, 6.0, 6.0, 6.0]
    difference = suspicion(kind, score(kind, wrong, entropies)) - suspicion(
        kind, score(kind, sound, entropies)
    )
    assert difference > 0 if kind != "entropy" else difference == 0


def test_low_is_suspicious_of_the_scores_that_measure_agreement():
    assert SUSPICIOUS_WHEN_LOW == {"similarity", "correlation", "margin"}
    assert suspicion("correlation", 0.25) == -0.25
    assert suspicion("excess", 0.25) == 0.25


def test_a_recipe_can_name_every_score():
    assert [*KNN_SCORES, *SCORES, MARGIN] == list(get_args(ScoreName))


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
