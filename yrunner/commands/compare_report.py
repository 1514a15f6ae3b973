"""What a person is told of an experiment: on the terminal, in compare.json and compare.html."""

from collections.abc import Iterable
from statistics import fmean

from yrunner.commands.compare_figures import (
    at_domain_accuracy,
    at_the_end,
    forgetting,
    measure_spread,
)
from yrunner.commands.compare_json import as_json
from yrunner.commands.compare_points import Point
from yrunner.commands.compare_tables import (
    MEASURE_WORDS,
    Experiment,
    arms_table,
    difference_table,
    failure_table,
    percent,
    result_table,
)
from yrunner.console import print_table, say
from yrunner.recipe.load import recipe_to_yaml
from yrunner.recipe.schema import Recipe
from yrunner.reports.comparison_plots import (
    CurvePoint,
    PlanePoint,
    curves_of_arms,
    forgetting_plane,
)
from yrunner.reports.html import Block, Code, Figures, Plot, Report, Table, Text, write_report
from yrunner.run_dir import CompareDir, write_json

END_CAPTION = (
    "In percent: of a side the mean over its tasks, of which an answer counts when it is right. "
    "Mean and sample standard deviation over the seeds. Forgetting is the general side minus that "
    "of the base, in points of a hundred."
)
PLANE_CAPTION = (
    "A point per arm and checkpoint, mean over the seeds; the largest is the last. Up: learned. "
    "Left: forgotten. An arm whose line runs above and to the right of another's is the better "
    "one at every moment. The dashed line is where arms are compared as equals."
)
CURVES = ("domain", "general", "memorised")


def tables(experiment: Experiment) -> list[Table]:
    """The tables of the results, in the order in which they are read."""
    chosen_end = at_the_end(experiment.curves)
    threshold = experiment.domain_accuracy
    chosen_equal = at_domain_accuracy(experiment.curves, threshold)
    updates = {plan.updates for plan in experiment.plans.values()}
    end = "At equal steps" if len(updates) == 1 else "After the last update"
    equal = f"At equal domain accuracy ({threshold:.1%})"
    caption = (
        f"The first checkpoint of each run that reaches {threshold:.1%} of the domain; "
        "runs that never do are left out."
    )
    found = [
        result_table(experiment, end, chosen_end, END_CAPTION),
        difference_table(experiment, end, chosen_end),
        result_table(experiment, equal, chosen_equal, caption),
        difference_table(experiment, equal, chosen_equal),
    ]
    return [table for table in found if table.rows]


def print_experiment(experiment: Experiment, folder: CompareDir) -> None:
    """Print the tables, what was not alike, and where everything is."""
    shown = tables(experiment)
    if experiment.failures:
        shown.append(failure_table(experiment.failures))
    for table in shown:
        print_table(table.title, table.columns, table.rows)
    for note in experiment.notes:
        say(f"note: {note}")
    say(f"table:  {folder.table}")
    say(f"report: {folder.page}")


def write_experiment(experiment: Experiment, recipe: Recipe, folder: CompareDir) -> None:
    """Write compare.json and compare.html."""
    write_json(folder.table, as_json(experiment))
    blocks: list[Block] = [
        Figures(_key_figures(experiment)),
        Plot(
            "What learning has cost",
            forgetting_plane(
                {arm: _path(experiment, arm) for arm in experiment.curves},
                PlanePoint(0.0, experiment.bases[experiment.arms[0].name].figures["domain"]),
                experiment.domain_accuracy,
            ),
            PLANE_CAPTION,
        ),
        *tables(experiment),
        *_curve_blocks(experiment),
        arms_table(experiment.arms, experiment.plans),
        *([Text("\n\n".join(experiment.notes), "What was not alike")] if experiment.notes else []),
        *([failure_table(experiment.failures)] if experiment.failures else []),
        Code("Recipe", recipe_to_yaml(recipe)),
    ]
    seeds = ", ".join(map(str, experiment.seeds))
    subtitle = f"yrunner compare: {len(experiment.arms)} arms, seeds {seeds}"
    write_report(Report(experiment.name, blocks, subtitle=subtitle), folder.page)


def _key_figures(experiment: Experiment) -> list[tuple[str, str, str]]:
    """The arm that forgot least at equal domain accuracy, and the one that learned most."""
    equal = at_domain_accuracy(experiment.curves, experiment.domain_accuracy)
    kept = {
        arm: lost
        for arm, points in equal.items()
        if (lost := forgetting(points, experiment.bases[arm]))
    }
    learned = {
        arm: figure
        for arm, points in at_the_end(experiment.curves).items()
        if (figure := measure_spread(points, "domain"))
    }
    most = max(learned, key=lambda arm: learned[arm].mean)
    threshold = f"{experiment.domain_accuracy:.0%} of the domain"
    figures = [
        ("learned most", most, f"{percent(learned[most])} % of the domain after the last update"),
        ("arms that got there", f"{len(kept)} of {len(experiment.arms)}", f"to {threshold}"),
    ]
    if kept:
        least = max(kept, key=lambda arm: kept[arm].mean)
        points = percent(kept[least], signed=True)
        note = f"{points} points of the general side at {threshold}"
        figures.append(("forgot least", least, note))
    return figures


def _path(experiment: Experiment, arm: str) -> list[PlanePoint]:
    """The mean of an arm's seeds after each checkpoint, in the plane of domain and forgetting."""
    base = experiment.bases[arm]
    return [
        PlanePoint(
            fmean(point.figures["general"] - base.figures["general"] for point in points),
            fmean(point.figures["domain"] for point in points),
        )
        for points in _by_step(experiment, arm).values()
    ]


def _by_step(experiment: Experiment, arm: str) -> dict[int, list[Point]]:
    found: dict[int, list[Point]] = {}
    for points in experiment.curves[arm].values():
        for point in points:
            found.setdefault(point.step, []).append(point)
    return dict(sorted(found.items()))


def _curve_blocks(experiment: Experiment) -> list[Plot]:
    blocks = []
    for measure in CURVES:
        if measure in experiment.measures:
            curves = {arm: _curve(experiment, arm, measure) for arm in experiment.curves}
            words = MEASURE_WORDS[measure]
            blocks.append(Plot(f"Over the updates: {words}", curves_of_arms(curves, words)))
    losses = {arm: _validation(experiment, arm) for arm in experiment.curves}
    if any(losses.values()):
        drawn = curves_of_arms(losses, "validation loss (nats per target)", is_share=False)
        blocks.append(Plot("Over the updates: validation loss", drawn))
    return blocks


def _curve(experiment: Experiment, arm: str, measure: str) -> list[CurvePoint]:
    by_step = _by_step(experiment, arm)
    if not by_step:
        return []
    found = [_curve_point(0, [experiment.bases[arm].figures[measure]])]
    for step, points in by_step.items():
        found.append(_curve_point(step, [point.figures[measure] for point in points]))
    return found


def _validation(experiment: Experiment, arm: str) -> list[CurvePoint]:
    losses: dict[int, list[float]] = {}
    for records in experiment.losses[arm]:
        for record in records:
            if "eval_loss" in record:
                losses.setdefault(record["step"], []).append(record["eval_loss"])
    return [_curve_point(step, values) for step, values in sorted(losses.items())]


def _curve_point(step: int, values: Iterable[float]) -> CurvePoint:
    known = list(values)
    return CurvePoint(step, fmean(known), min(known), max(known))
