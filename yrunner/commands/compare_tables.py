"""The tables of an experiment, the same on a terminal and in the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from yrunner.commands.compare_figures import (
    Chosen,
    Curves,
    Spread,
    differences,
    forgetting,
    measure_spread,
    spread,
)
from yrunner.commands.compare_jobs import Failure
from yrunner.commands.compare_plan import PlanFacts
from yrunner.commands.compare_points import Point
from yrunner.console import Cell
from yrunner.evaluation.results import Difference
from yrunner.recipe.arms import Arm
from yrunner.reports.html import Table
from yrunner.training.metrics_file import Record

MEASURE_WORDS = {
    "domain": "domain",
    "general": "general",
    "quality": "quality",
    "memorised": "memorised faults",
    "corrected": "corrected faults",
    "repetition_3": "3-gram repetition",
    "repetition_4": "4-gram repetition",
}
"""What tables call a measure, in their order; forgetting stands behind `general`."""
SET_APART = ("domain", "general", "quality", "memorised")
"""Measures whose differences are tested; that of forgetting is that of `general`."""
DIFFERENCE_CAPTION = (
    "In points of a hundred, each arm minus the first. The interval is a 95 % paired bootstrap "
    "over questions and seeds; * marks one that does not hold 0."
)


@dataclass(frozen=True)
class Experiment:
    """Everything that is known of an experiment when its runs have ended."""

    name: str
    arms: Sequence[Arm]
    seeds: Sequence[int]
    plans: Mapping[str, PlanFacts]
    curves: Curves
    """The points of the runs that were measured."""
    bases: Mapping[str, Point]
    """The base of each arm."""
    domain_accuracy: float
    """At which arms are compared as equals."""
    losses: Mapping[str, Sequence[Sequence[Record]]]
    """What each arm's runs have logged while they were trained."""
    notes: Sequence[str] = ()
    failures: Mapping[str, Failure] = field(default_factory=dict)
    """Why runs failed, by their names."""

    @property
    def measures(self) -> list[str]:
        """What was measured, in the order of tables."""
        base = next(iter(self.bases.values()))
        return [measure for measure in MEASURE_WORDS if measure in base.figures]


def arms_table(arms: Sequence[Arm], plans: Mapping[str, PlanFacts]) -> Table:
    """What each arm changes, and what it learns from."""
    rows: list[tuple[Cell, ...]] = []
    for arm in arms:
        plan = plans[arm.name]
        changes = "\n".join(arm.overrides) or "nothing"
        rows.append((arm.name, changes, plan.updates, plan.targets, plan.rows))
    caption = "Updates, targets seen (each as often as it was) and different rows of one run."
    return Table("Arms", ("arm", "changes", "updates", "targets", "rows"), rows, caption)


def result_table(experiment: Experiment, title: str, chosen: Chosen, caption: str) -> Table:
    """The figures of each arm at its chosen points, mean and spread over the seeds; the base."""
    measures = experiment.measures
    columns = ["arm", "runs", "update"]
    for measure in measures:
        columns += [MEASURE_WORDS[measure], *(["forgetting"] if measure == "general" else [])]
    rows = [_base_row(experiment)]
    for arm, points in chosen.items():
        runs = f"{len(points)} of {len(experiment.seeds)}"
        update = spread(point.step for point in points.values())
        row: list[Cell] = [arm, runs, f"{update.mean:,.0f}" if update else None]
        for measure in measures:
            row.append(percent(measure_spread(points, measure)))
            if measure == "general":
                row.append(percent(forgetting(points, experiment.bases[arm]), signed=True))
        rows.append(row)
    return Table(title, columns, rows, caption)


def difference_table(experiment: Experiment, title: str, chosen: Chosen) -> Table:
    """Each arm minus the first, with what chance alone could make of it."""
    measures = [measure for measure in SET_APART if measure in experiment.measures]
    columns = ["arm", "seeds"]
    for measure in measures:
        columns += [MEASURE_WORDS[measure], "95 %"]
    first, *others = chosen
    by_measure = {measure: differences(chosen, measure) for measure in measures}
    rows = []
    for arm in others:
        row: list[Cell] = [arm, len(chosen[first].keys() & chosen[arm].keys())]
        for measure in measures:
            row += _difference_cells(by_measure[measure][arm])
        rows.append(row)
    return Table(f"{title}: beside {first}", columns, rows, DIFFERENCE_CAPTION)


def failure_table(failures: Mapping[str, Failure]) -> Table:
    """Which runs failed, and why."""
    rows = [(name, failure.message, str(failure.log)) for name, failure in failures.items()]
    return Table("Failed", ("run", "why", "log"), rows)


def percent(figure: Spread | None, *, signed: bool = False) -> str | None:
    """`88.9 ± 2.1 %`; without a deviation where there is one seed, None where nothing is known."""
    if figure is None:
        return None
    mean = f"{100 * figure.mean:{'+' if signed else ''}.1f}"
    return mean if figure.deviation is None else f"{mean} ± {100 * figure.deviation:.1f}"


def _base_row(experiment: Experiment) -> list[Cell]:
    base = experiment.bases[experiment.arms[0].name]
    row: list[Cell] = ["(base)", None, 0]
    for measure in experiment.measures:
        row.append(f"{100 * base.figures[measure]:.1f}")
        if measure == "general":
            row.append(None)
    return row


def _difference_cells(difference: Difference | None) -> list[Cell]:
    if difference is None:
        return [None, None]
    value = f"{100 * difference.value:+.1f}"
    if difference.low is None or difference.high is None:
        return [value, None]
    low, high = (f"{100 * end:+.1f}" for end in (difference.low, difference.high))
    star = "" if difference.is_noise else " *"
    # Blanks that do not break: an interval on two lines is hard to read.
    return [value, f"{low} to {high}{star}".replace(" ", "\N{NO-BREAK SPACE}")]
