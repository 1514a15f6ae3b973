"""What stands behind the figures of an experiment: each task, each kind of fault."""

from collections.abc import Callable, Mapping

from yrunner.commands.compare_figures import Chosen, Spread, spread
from yrunner.commands.compare_points import Point
from yrunner.commands.compare_tables import Experiment, percent
from yrunner.console import Cell
from yrunner.reports.html import Table

TASK_CAPTION = (
    "In percent, the main figure of each task; a side of the tables above is the mean of its tasks."
)
FAULT_CAPTION = "In percent of the faulty rows of each kind: the wrong answer comes back."

Details = Callable[[Point], Mapping[str, float]]
"""Finer figures of a point, by what a table calls them."""


def detail_tables(experiment: Experiment, title: str, chosen: Chosen) -> list[Table]:
    """A table of the tasks and one of the kinds of fault, as far as there are several of them."""
    base = next(iter(experiment.bases.values()))
    wanted = [
        (f"{title}: by task", task_shares, TASK_CAPTION, len(task_shares(base)) > 2),
        (f"{title}: memorised, by kind", fault_shares, FAULT_CAPTION, len(fault_shares(base)) > 1),
    ]
    return [
        _table(experiment, name, chosen, details, caption)
        for name, details, caption, says_more in wanted
        if says_more
    ]


def task_shares(point: Point) -> dict[str, float]:
    """The main figure of each task, the tasks of a side beside each other."""
    tasks = sorted(point.results.tasks.items(), key=lambda item: item[1].side)
    return {name: task.figures[task.headline] for name, task in tasks}


def fault_shares(point: Point) -> dict[str, float]:
    """The memorised share of each kind of fault; empty where the list names no kinds."""
    faults = point.results.faults
    return {} if faults is None else faults.by_kind


def detail_spreads(points: Mapping[int, Point], details: Details) -> dict[str, Spread]:
    """The finer figures of an arm over its seeds."""
    shares = [details(point) for point in points.values()]
    names = shares[0] if shares else ()
    found = {name: spread(share[name] for share in shares) for name in names}
    return {name: each for name, each in found.items() if each is not None}


def _table(
    experiment: Experiment, title: str, chosen: Chosen, details: Details, caption: str
) -> Table:
    first = experiment.bases[experiment.arms[0].name]
    columns = list(details(first))
    base = [percent(Spread(share, None)) for share in details(first).values()]
    rows: list[list[Cell]] = [["(base)", *base]]
    for arm, points in chosen.items():
        spreads = detail_spreads(points, details)
        rows.append([arm, *(percent(spreads.get(column)) for column in columns)])
    return Table(title, ["arm", *columns], rows, caption)
