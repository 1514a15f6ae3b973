"""Folds for cross-fitting: copies of a row share a fold, so that none scores another."""

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

from yrunner.errors import YRunnerError


def group_copies(rows: Sequence[Hashable], hashes: Sequence[str]) -> list[str]:
    """The group of each example: one for all parts of a row and of its copies.

    `rows`: the row of each example; `hashes`: the hash of its content.
    """
    parts: defaultdict[Hashable, list[str]] = defaultdict(list)
    for row, content in zip(rows, hashes, strict=True):
        parts[row].append(content)
    return ["".join(parts[row]) for row in rows]


def make_folds(groups: Sequence[Hashable], num_folds: int, seed: int) -> list[int]:
    """The fold of each row, from 0 to `num_folds` - 1; deterministic for groups and seed.

    Rows of one group (see `group_copies`) share a fold: a copy of a faulty row would teach the
    fault to the model that has to find it. Otherwise folds are of equal size. Raises `YRunnerError`
    if there are fewer groups than folds.
    """
    sizes = Counter(groups)
    if len(sizes) < num_folds:
        raise YRunnerError(
            f"{num_folds} folds need {num_folds} different rows; there are {len(sizes)}",
            remedy="set sort.cross_fit to 0, or add rows",
        )
    drawn = list(sizes)
    random.Random(f"{seed} folds").shuffle(drawn)
    rows_of_fold = [0] * num_folds
    fold_of_group: dict[Hashable, int] = {}
    # Largest groups first, so that single rows even the folds out.
    for group in sorted(drawn, key=sizes.__getitem__, reverse=True):
        smallest = rows_of_fold.index(min(rows_of_fold))
        fold_of_group[group] = smallest
        rows_of_fold[smallest] += sizes[group]
    return [fold_of_group[group] for group in groups]
