"""Group the rows of a corpus by what their targets are about, with a picture and words for each.

A row is the mean of its contexts, the hidden states before its targets (measure.py). HDBSCAN
(Campello et al., 2013, https://doi.org/10.1007/978-3-642-37456-2_14) then finds groups in which
rows lie closer than around them. It needs no number of clusters, and leaves rows alone that are
like no others. The package scikit-learn does it.
"""

# R = rows, N = targets of a row, C = size of a context, D = dimensions that are compared

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yrunner.data.text_metrics import units_of
from yrunner.scoring.measure import TokenScores
from yrunner.scoring.order import NO_CLUSTER

DIMENSIONS = 16
"""Main directions (principal components) in which rows are compared."""
CLOSE = 5
"""A row is in the midst of others as far as this many, itself included, are near."""
FEWEST_ROWS = 5
"""Rows of the smallest cluster, in a small corpus."""
LEAST_COSINE = 0.5
"""A row belongs to a cluster if it is at most 60 degrees from its mean direction."""
MOST_CLUSTERED = 20_000
"""Rows that are clustered, as the time grows with the square of their number; each further one
joins the cluster of the nearest."""
ROWS_AT_ONCE = 1024
"""Further rows that are compared together."""
MOST_READ = 5000
"""Rows whose words are counted: all, or an even selection."""
MOST_WORDS = 6
TELLING = 0.2
"""A word tells a cluster if the share of its rows with it is higher than elsewhere by this ..."""
TIMES = 2.0
"""... and this many times as high, which words of grammar are not."""
LONGEST_CHINESE = 4
"""Characters of a Chinese word: pieces of 2 to 4 are tried, as there are no blanks."""
FIRST_CHINESE = "\u2e80"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Clusters:
    """Rows in groups; a number stands for a group, 1 for the largest."""

    numbers: list[int]
    """The cluster of each row; `NO_CLUSTER` for rows in none."""
    plane: list[tuple[float, float]]
    """Each row as a point, by the two main directions."""
    central: dict[int, list[int]]
    """The rows of each cluster by its number, the most typical first: nearest to its mean."""

    @property
    def sizes(self) -> dict[int, int]:
        """Rows of each cluster."""
        return {number: len(rows) for number, rows in self.central.items()}


def default_smallest(num_rows: int) -> int:
    """Rows of the smallest cluster where the recipe says nothing: more in a larger corpus."""
    return max(FEWEST_ROWS, round(sqrt(num_rows) / 2))


def find_clusters(
    scores: Sequence[TokenScores],
    rows: Sequence[range],
    *,
    smallest: int | None,
    seed: int,
) -> Clusters:
    """Cluster rows, given the scores of all examples, with contexts, and the examples of each row.

    `smallest`: rows of the smallest cluster. `seed` chooses the rows of a corpus that is too large
    to cluster all of them. Equal input gives equal clusters.
    """
    smallest = smallest or default_smallest(len(rows))
    row_RC = _row_vectors(scores, rows)
    place_RD = _main_directions(row_RC)
    direction_RD = _normalised(place_RD)
    chosen = np.arange(len(rows))
    if len(rows) > MOST_CLUSTERED:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:MOST_CLUSTERED])
    labels = np.full(len(rows), -1)
    labels[chosen] = _hdbscan(direction_RD[chosen], smallest)
    others = np.setdiff1d(np.arange(len(rows)), chosen)
    for start in range(0, len(others), ROWS_AT_ONCE):
        part = others[start : start + ROWS_AT_ONCE]
        nearest = (direction_RD[part] @ direction_RD[chosen].T).argmax(axis=1)
        labels[part] = labels[chosen[nearest]]
    _leave_alone(direction_RD, labels)
    numbers = _by_size(labels.tolist())
    return Clusters(
        numbers,
        [(float(x), float(y)) for x, y in place_RD[:, :2]],
        _central(direction_RD, numbers),
    )


def _row_vectors(scores: Sequence[TokenScores], rows: Sequence[range]) -> Floats:
    """The mean direction of each row's contexts from the mean of all: raw hidden states mostly
    point one way."""

    def contexts() -> Iterator[Floats]:
        for examples in rows:
            parts = [scores[place].context_NC for place in examples]
            assert all(part is not None for part in parts), "scores must have contexts"
            yield np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])

    total, number = np.zeros(1), 0
    for context_NC in contexts():
        total, number = total + context_NC.sum(axis=0), number + len(context_NC)
    centre_C = total / max(1, number)
    row_RC = np.zeros((len(rows), len(centre_C)))
    for row, context_NC in enumerate(contexts()):
        if len(context_NC):
            row_RC[row] = _normalised(context_NC - centre_C).mean(axis=0)
    return row_RC


def _main_directions(row_RC: Floats) -> Floats:
    """Rows by their principal components, the largest first, shape [R, D] with at least 2."""
    centred_RC = row_RC - row_RC.mean(axis=0)
    values, vectors_CC = np.linalg.eigh(centred_RC.T @ centred_RC)
    chosen_CD = vectors_CC[:, np.argsort(-values, kind="stable")[:DIMENSIONS]]
    # The sign of an eigenvector is arbitrary: its largest part is made positive.
    largest_D = np.take_along_axis(chosen_CD, np.abs(chosen_CD).argmax(axis=0)[None], axis=0)
    place_RD = centred_RC @ (chosen_CD * np.where(largest_D < 0, -1, 1))
    return np.pad(place_RD, ((0, 0), (0, max(0, 2 - place_RD.shape[1]))))


def _hdbscan(direction_RD: Floats, smallest: int) -> NDArray[np.int64]:
    """The label of each row, -1 for those in no cluster."""
    if len(direction_RD) < 2 * smallest:
        return np.full(len(direction_RD), -1)
    from sklearn.cluster import HDBSCAN

    close = min(CLOSE, smallest)
    found: Any = HDBSCAN(min_cluster_size=smallest, min_samples=close, copy=True)
    return np.asarray(found.fit_predict(direction_RD), dtype=np.int64)


def _leave_alone(direction_RD: Floats, labels: NDArray[np.int64]) -> None:
    """Take rows out of their cluster that point away from its mean.

    HDBSCAN counts a row that is near to no other as a member of the cluster that it meets last.
    """
    for label in range(labels.max(initial=-1) + 1):
        (members,) = np.nonzero(labels == label)
        mean_D = _normalised(direction_RD[members].mean(axis=0))
        labels[members[direction_RD[members] @ mean_D < LEAST_COSINE]] = -1


def _by_size(labels: Sequence[int]) -> list[int]:
    """Labels as numbers from 1, the largest cluster first, then the one with the first row."""
    counts = Counter(label for label in labels if label >= 0)
    numbers = {label: place for place, (label, _) in enumerate(counts.most_common(), start=1)}
    return [numbers.get(label, NO_CLUSTER) for label in labels]


def _central(direction_RD: Floats, numbers: Sequence[int]) -> dict[int, list[int]]:
    of_row = np.array(numbers)
    central = {}
    for number in range(1, max(numbers, default=0) + 1):
        (members,) = np.nonzero(of_row == number)
        near = direction_RD[members] @ direction_RD[members].mean(axis=0)
        central[number] = members[np.argsort(-near, kind="stable")].tolist()
    return central


def _normalised(vector_RC: Floats) -> Floats:
    length_R = np.linalg.norm(vector_RC, axis=-1, keepdims=True)
    return vector_RC / np.where(length_R > 0, length_R, 1)


def telling_words(texts: Sequence[str], numbers: Sequence[int]) -> dict[int, list[str]]:
    """The words that tell each cluster from all other rows, the best first.

    A word counts if more of the cluster's rows have it than of all others: by `TELLING`, and
    `TIMES` as many. The best are common inside and rare outside.
    """
    inside: dict[int, Counter[str]] = {}
    everywhere: Counter[str] = Counter()
    step = -(-len(texts) // MOST_READ) or 1
    texts, numbers = texts[::step], numbers[::step]
    for text, number in zip(texts, numbers, strict=True):
        words = _words_of(text)
        everywhere.update(words)
        inside.setdefault(number, Counter()).update(words)
    sizes = Counter(numbers)
    return {
        number: _best_words(inside[number], sizes[number], everywhere, len(texts))
        for number in sorted(inside)
        if number != NO_CLUSTER
    }


def _best_words(
    inside: Counter[str], size: int, everywhere: Counter[str], num_rows: int
) -> list[str]:
    others = max(1, num_rows - size)
    value: dict[str, float] = {}
    for word, count in inside.items():
        share, elsewhere = count / size, (everywhere[word] - count) / others
        if share >= max(elsewhere + TELLING, TIMES * elsewhere):
            value[word] = share * log((share + 1 / num_rows) / (elsewhere + 1 / num_rows))
    # Of equal words the longer one says more; the rest of the order only has to be the same.
    chosen: list[str] = []
    for word in sorted(value, key=lambda word: (-value[word], -len(word), word)):
        # Pieces of one Chinese word are one word.
        is_part = word[0] >= FIRST_CHINESE and any(
            word in other or other in word for other in chosen
        )
        if not is_part:
            chosen.append(word)
        if len(chosen) == MOST_WORDS:
            break
    return chosen


def _words_of(text: str) -> set[str]:
    """Words without numbers and single letters; pieces of Chinese text."""
    words = set()
    chinese = ""
    for unit in [*units_of(text), ""]:
        if unit and unit[0] >= FIRST_CHINESE:
            chinese += unit
            continue
        words |= _pieces(chinese)
        chinese = ""
        if len(unit) > 1 and not unit[0].isdigit():
            words.add(unit)
    return words


def _pieces(chinese: str) -> set[str]:
    return {
        chinese[start : start + size]
        for size in range(2, LONGEST_CHINESE + 1)
        for start in range(len(chinese) - size + 1)
    }
