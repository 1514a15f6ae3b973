"""Figures of an experiment from the points of its runs: at equal steps, accuracy and loss."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from statistics import fmean, stdev

from yrunner.commands.compare.points import Point, difference_in
from yrunner.evaluation.results import Difference

SHARE_OF_THE_BEST = 0.9
"""Of the best arm's domain accuracy: the default at which arms count as equal."""

Curves = Mapping[str, Mapping[int, tuple[Point, ...]]]
"""The points of each arm and seed, by step."""
Chosen = Mapping[str, Mapping[int, Point]]
"""One point of each arm and seed that has one."""
Losses = Mapping[str, Mapping[int, Mapping[int, float]]]
"""The validation losses of each arm and seed, by update; update 0 is the base."""
LEAST_LOSS = 1e-9
"""Nats; lower losses count as this, because their logarithm is taken."""


@dataclass(frozen=True)
class Spread:
    """Mean and deviation of a figure over the seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None for one seed."""


@dataclass(frozen=True)
class Between:
    """The figures of a run between two of its points."""

    step: float
    figures: Mapping[str, float]


def at_the_end(curves: Curves) -> Chosen:
    """The last point of every run."""
    return {
        arm: {seed: points[-1] for seed, points in runs.items()} for arm, runs in curves.items()
    }


def domain_threshold(curves: Curves) -> float:
    """`SHARE_OF_THE_BEST` of the best arm's domain accuracy, averaged over its seeds."""
    best = [
        fmean(max(point.figures["domain"] for point in points) for points in runs.values())
        for runs in curves.values()
    ]
    return SHARE_OF_THE_BEST * max(best)


def at_domain_accuracy(curves: Curves, threshold: float) -> Chosen:
    """The first point of each run that reaches the threshold, if any."""
    chosen: dict[str, dict[int, Point]] = {}
    for arm, runs in curves.items():
        chosen[arm] = {}
        for seed, points in runs.items():
            reached = (point for point in points if point.figures["domain"] >= threshold)
            if point := next(reached, None):
                chosen[arm][seed] = point
    return chosen


def loss_threshold(losses: Losses) -> float:
    """The validation loss that every run reaches, in nats."""
    return max(min(run.values()) for runs in losses.values() for run in runs.values())


def at_validation_loss(
    curves: Curves,
    bases: Mapping[str, Point],
    losses: Losses,
    threshold: float,
    figures: Callable[[Point], Mapping[str, float]],
) -> dict[str, dict[int, Between]]:
    """Each run where its validation loss first falls to the threshold, if it does.

    That lies between two points, of which the first may be the base. The figures are interpolated,
    linearly in the logarithm of the loss.
    """
    chosen: dict[str, dict[int, Between]] = {}
    for arm, runs in curves.items():
        chosen[arm] = {}
        for seed, points in runs.items():
            by_step = {step: log(max(loss, LEAST_LOSS)) for step, loss in losses[arm][seed].items()}
            known = [point for point in (bases[arm], *points) if point.step in by_step]
            if found := _first_at(known, by_step, log(max(threshold, LEAST_LOSS)), figures):
                chosen[arm][seed] = found
    return chosen


def _first_at(
    points: Sequence[Point],
    level: Mapping[int, float],
    threshold: float,
    figures: Callable[[Point], Mapping[str, float]],
) -> Between | None:
    for before, after in pairwise(points):
        if level[after.step] <= threshold < level[before.step]:
            share = (level[before.step] - threshold) / (level[before.step] - level[after.step])
            start, end = figures(before), figures(after)
            return Between(
                before.step + share * (after.step - before.step),
                {name: start[name] + share * (end[name] - start[name]) for name in end},
            )
    return None


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and deviation of the values; None without any."""
    known = list(values)
    if not known:
        return None
    return Spread(fmean(known), stdev(known) if len(known) > 1 else None)


def measure_spread(points: Mapping[int, Point], measure: str) -> Spread | None:
    """A measure over an arm's seeds."""
    return spread(point.figures[measure] for point in points.values())


def forgetting(points: Mapping[int, Point], base: Point) -> Spread | None:
    """General side of an arm minus that of its base; below 0, the arm forgot something."""
    return spread(point.figures["general"] - base.figures["general"] for point in points.values())


def differences(chosen: Chosen, measure: str) -> dict[str, Difference | None]:
    """Each arm minus the first, over their common seeds; None without any."""
    first, *others = chosen
    found: dict[str, Difference | None] = {}
    for arm in others:
        seeds = [seed for seed in chosen[first] if seed in chosen[arm]]
        pairs = [(chosen[first][seed].results, chosen[arm][seed].results) for seed in seeds]
        found[arm] = difference_in(measure, pairs) if pairs else None
    return found


def differences_to_base(
    chosen: Chosen, bases: Mapping[str, Point], measure: str
) -> dict[str, Difference | None]:
    """Each arm minus its base, over its seeds; None without any."""
    found: dict[str, Difference | None] = {}
    for arm, points in chosen.items():
        pairs = [(bases[arm].results, point.results) for point in points.values()]
        found[arm] = difference_in(measure, pairs) if pairs else None
    return found
