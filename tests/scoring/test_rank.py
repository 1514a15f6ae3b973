"""Scores against their formulas, for every row there can be."""

import math
import statistics
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from yrunner.recipe.schema.sort import ScoreName
from yrunner.scoring.order import MARGIN, suspicion
from yrunner.scoring.rank import KNN_SCORES, SCORES, Neighbourhood, outlier_targets, score_row

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


def test_a_recipe_can_name_every_score():
    assert [*KNN_SCORES, *SCORES, MARGIN] == list(get_args(ScoreName))
