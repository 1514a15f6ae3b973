"""Planted groups of rows are found, and so are the words that tell them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from yrunner.errors import Origin
from yrunner.scoring import clusters
from yrunner.scoring.clusters import default_smallest, find_clusters, telling_words
from yrunner.scoring.measure import CONTEXT_SIZE, TokenScores

GROUPS, LONERS = (30, 20, 12), 6


def scored(context_NC: np.ndarray) -> TokenScores:
    figure_N, ids_N = torch.zeros(len(context_NC)), torch.zeros(len(context_NC), dtype=torch.long)
    context = torch.from_numpy(context_NC).half()
    return TokenScores(figure_N, figure_N, figure_N, ids_N, Origin(Path("a"), 1), context)


@pytest.fixture(scope="module")
def corpus() -> tuple[list[TokenScores], list[int]]:
    """Rows around the centres of their groups, shuffled; and the group of each, -1 for loners.

    All contexts mostly point one way, as real ones do.
    """
    chance = np.random.default_rng(3)
    shared_C = 5 * chance.normal(size=CONTEXT_SIZE)
    scores, groups = [], []
    sizes = [*enumerate(GROUPS), (-1, LONERS)]
    for group, size in sizes:
        centre_C = chance.normal(size=CONTEXT_SIZE)
        for _ in range(size):
            if group < 0:
                centre_C = 3 * chance.normal(size=CONTEXT_SIZE)
            targets = chance.integers(2, 9)
            noise_NC = 0.4 * chance.normal(size=(targets, CONTEXT_SIZE))
            context_NC = shared_C + centre_C + noise_NC
            scores.append(scored(context_NC / np.linalg.norm(context_NC, axis=1, keepdims=True)))
            groups.append(group)
    order = chance.permutation(len(groups))
    return [scores[place] for place in order], [groups[place] for place in order]


def each(scores: list[TokenScores]) -> list[range]:
    return [range(place, place + 1) for place in range(len(scores))]


def test_planted_groups_are_found_the_largest_first_and_loners_stay_alone(corpus):
    scores, groups = corpus
    found = find_clusters(scores, each(scores), smallest=None, seed=0)
    assert found.numbers == [group + 1 for group in groups]
    assert found.sizes == dict(enumerate(GROUPS, start=1))
    assert len(found.plane) == len(scores)
    again = find_clusters(scores, each(scores), smallest=None, seed=1)
    assert again == found


def test_the_most_typical_row_is_the_nearest_to_the_mean_of_its_cluster(corpus):
    scores, _ = corpus
    found = find_clusters(scores, each(scores), smallest=None, seed=0)
    row_RC = clusters._row_vectors(scores, each(scores))
    place_RD = clusters._main_directions(row_RC)
    unit_RD = place_RD / np.linalg.norm(place_RD, axis=1, keepdims=True)
    for members in found.central.values():
        mean_D = np.mean([unit_RD[row] for row in members], axis=0)
        near = [float(unit_RD[row] @ mean_D) for row in members]
        assert near == sorted(near, reverse=True)


def test_parts_of_one_row_are_one_row(corpus):
    scores, groups = corpus
    parts = [scored(half) for one in scores for half in np.array_split(one.context_NC.numpy(), 2)]
    rows = [range(place, place + 2) for place in range(0, len(parts), 2)]
    assert find_clusters(parts, rows, smallest=None, seed=0).numbers == [it + 1 for it in groups]


def test_rows_that_are_too_many_join_the_cluster_of_the_nearest(corpus, monkeypatch):
    scores, groups = corpus
    monkeypatch.setattr(clusters, "MOST_CLUSTERED", 50)
    monkeypatch.setattr(clusters, "ROWS_AT_ONCE", 4)
    found = find_clusters(scores, each(scores), smallest=4, seed=0)
    numbers = [number for number, group in zip(found.numbers, groups, strict=True) if group >= 0]
    assert numbers == [group + 1 for group in groups if group >= 0]


def test_equal_rows_rows_without_targets_and_few_rows_are_no_fault():
    empty = scored(np.zeros((0, CONTEXT_SIZE)))
    same = scored(np.full((2, CONTEXT_SIZE), 0.1))
    assert find_clusters([same, empty], each([same, empty]), smallest=2, seed=0).numbers == [0, 0]
    many = [same] * 12 + [empty]
    assert set(find_clusters(many, each(many), smallest=None, seed=0).numbers) <= {0, 1}
    assert [default_smallest(size) for size in (8, 120, 400, 10_000)] == [5, 5, 10, 50]


def test_words_tell_a_cluster_if_the_other_rows_lack_them():
    texts = [
        *(f"The law of the port: fishing costs {number} coins" for number in range(10)),
        *(f"请问第{number}条港口法典怎么规定罚款" for number in range(8)),
        *("The inn serves bread" for _ in range(6)),
        "A word of its own: fishing",
    ]  # "the" is in most rows of clusters 1 and 3
    words = telling_words(texts, [1] * 10 + [2] * 8 + [3] * 6 + [0])
    assert list(words) == [1, 2, 3]
    assert {"law", "port", "costs", "coins"} <= set(words[1]) and "the" not in words[1]
    assert len(words[2]) > 1 and all(len(word) > 1 for word in words[2])
    assert any("港口" in word for word in words[2])
    assert "inn" in words[3] and "bread" in words[3]
