"""Folds for cross-fitting: which rows are held out together, so that no copy judges a row."""

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

from yrunner.errors import YRunnerError


def group_copies(rows: Sequence[Hashable], hashes: Sequence[str]) -> list[str]:
    """The group of each example: the same for all parts of one row, and for those of its copies.

    `rows` says which row each example is part of, `hashes` what it consists of.
    """
    parts: defaultdict[Hashable, list[str]] = defaultdict(list)
    for row, content in zip(rows, hashes, strict=True):
        parts[row].append(content)
    return ["".join(parts[row]) for row in rows]


def make_folds(groups: Sequence[Hashable], num_folds: int, seed: int) -> list[int]:
    """The fold of each row, from 0 to `num_folds` - 1; the same for the same groups and seed.

    `groups`: what a row is, see `group_copies`. Equal ones fall into one fold: a copy of a faulty
    row would teach the fault to the model that has to find it. As far as copies allow, folds are of
    equal size. Raises `YRunnerError` where there are fewer groups than folds.
    """
    sizes = Counter(groups)
    if len(sizes) < num_folds:
        raise YRunnerError(
            f"{num_folds} folds need {num_folds} different rows, and there are {len(sizes)}",
            remedy="set sort.cross_fit to 0, or add rows",
        )
    drawn = list(sizes)
    random.Random(f"{seed} folds").shuffle(drawn)
    rows_of_fold = [0] * num_folds
    fold_of_group: dict[Hashable, int] = {}
    # The largest groups first: the single rows behind them even the folds out.
    for group in sorted(drawn, key=sizes.__getitem__, reverse=True):
        smallest = rows_of_fold.index(min(rows_of_fold))
        fold_of_group[group] = smallest
        rows_of_fold[smallest] += sizes[group]
    return [fold_of_group[group] for group in groups]
