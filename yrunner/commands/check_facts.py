"""What can be said of a run before it starts, in numbers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from yrunner.data.collate import SlicedExamples
from yrunner.data.conversation import TokenizedExample
from yrunner.data.packing import fill_rate
from yrunner.data.plan import Plan
from yrunner.data.prepared import Prepared
from yrunner.data.report import FileReport
from yrunner.recipe.schema import Recipe, TrainSection
from yrunner.training.arguments import count_warmup, learning_rates

SHORTEST_BIN = 16
POINTS_OF_CURVE = 60


@dataclass(frozen=True)
class Steps:
    """How many optimizer updates the run makes."""

    updates: int
    updates_of_epochs: list[int]
    """Of each epoch, as far as the run comes."""
    rows_per_update: int
    """Examples, or packed rows, of the field."""
    kept_rows_per_update: int
    """Rows beside them that are held to the base, see keep in the recipe."""
    packed_rows: int | None
    """Rows that the examples of an epoch are packed into; None without packing."""
    packing_fill: float | None
    """Share of the packed rows that holds tokens."""


@dataclass(frozen=True)
class Schedule:
    """The course of the learning rate."""

    warmup_updates: int
    points: list[tuple[int, float]]
    """Updates, counted from 1, with their learning rates: evenly from the first to the last."""


@dataclass(frozen=True)
class DataFacts:
    """What the examples are like."""

    examples: int
    tokens: int
    targets: int
    lengths: list[tuple[int, int]]
    """Upper ends of bins in tokens, and the training examples in each."""
    longest: int
    scripts: dict[str, float]
    """Share of the letters and digits of the training files that is of each script."""


def data_facts(prepared: Prepared) -> DataFacts:
    """Lengths, targets and languages of the training examples."""
    lengths_E = prepared.train.lengths
    return DataFacts(
        examples=len(prepared.train),
        tokens=int(lengths_E.sum()),
        targets=int(prepared.train.num_targets.sum()),
        lengths=count_lengths(lengths_E),
        longest=int(lengths_E.max()),
        scripts=script_shares([it for it in prepared.reports if it.purpose == "train"]),
    )


def count_lengths(lengths_E: Any) -> list[tuple[int, int]]:
    """Examples by length: upper ends of the bins, doubling from 16 on, and how many fall in each.

    The first bin starts at 1; empty ones before the first example are left out.
    """
    ends = [SHORTEST_BIN]
    while ends[-1] < lengths_E.max():
        ends.append(2 * ends[-1])
    counts, _ = np.histogram(lengths_E, bins=[0.5, *(end + 0.5 for end in ends)])
    bins = [(end, int(count)) for end, count in zip(ends, counts, strict=True)]
    first = next(number for number, (_, count) in enumerate(bins) if count)
    return bins[first:]


def script_shares(reports: Sequence[FileReport]) -> dict[str, float]:
    """Share of each script, the largest first; scripts under one in a thousand are left out."""
    counts: Counter[str] = sum((report.scripts for report in reports), Counter())
    total = counts.total()
    return {name: n / total for name, n in counts.most_common() if n >= total / 1000}


def count_steps(recipe: Recipe, prepared: Prepared, plan: Plan) -> Steps:
    """The exact updates of the run, and how full its packed rows are."""
    ends = [min(end, plan.num_updates) for end in plan.epoch_ends]
    return Steps(
        updates=plan.num_updates,
        updates_of_epochs=[after - before for before, after in pairwise([0, *ends])],
        rows_per_update=plan.lanes,
        kept_rows_per_update=plan.kept,
        packed_rows=None if plan.packs is None else len(plan.packs),
        packing_fill=None
        if plan.packs is None
        else fill_rate(prepared.train.lengths, len(plan.packs), recipe.data.max_length),
    )


def largest_micro_batch(recipe: Recipe, prepared: Prepared, plan: Plan) -> list[TokenizedExample]:
    """The examples of the micro-batch of the first epoch that has the most tokens."""
    return SlicedExamples(prepared.train, recipe.train.token_batch).__getitems__(
        plan.largest_micro_batch()
    )


def schedule(train: TrainSection, num_updates: int) -> Schedule:
    """The learning rate over the run."""
    points = min(POINTS_OF_CURVE, num_updates)
    updates = sorted({round(it) for it in np.linspace(0, num_updates - 1, points)})
    rates = learning_rates(train, num_updates, updates)
    pairs = [(update + 1, rate) for update, rate in zip(updates, rates, strict=True)]
    return Schedule(count_warmup(train, num_updates), pairs)
