"""The report of an experiment: terminal, compare.json and compare.html."""

from collections.abc import Callable, Iterable
from functools import partial
from statistics import fmean

from yrunner.commands.compare.figures import (
    Chosen,
    at_domain_accuracy,
    at_the_end,
    forgetting,
    measure_spread,
)
from yrunner.commands.compare.points import Point
from yrunner.commands.compare.tables import (
    MEASURE_WORDS,
    Experiment,
    arms_table,
    as_json,
    base_difference_table,
    detail_tables,
    difference_table,
    drawn_table,
    failure_table,
    loss_table,
    percent,
    result_table,
)
from yrunner.console import counted, print_table, say
from yrunner.recipe.load import recipe_to_yaml
from yrunner.recipe.schema.recipe import Recipe
from yrunner.reports.comparison_plots import (
    CurvePoint,
    PlanePoint,
    curves_of_arms,
    forgetting_plane,
)
from yrunner.reports.html import Block, Code, KeyFigures, Plot, Report, Table, Text, write_report
from yrunner.storage.run_dir import CompareDir, write_json

END_CAPTION = (
    "In percent: the mean over the tasks of each side. "
    "Mean and sample standard deviation over the seeds. Forgetting is the general side minus that "
    "of the base, in percentage points."
)
PLANE_CAPTION = (
    "One point per arm and checkpoint, mean over the seeds; the largest is the last. Up: learned. "
    "Left: forgotten. An arm whose line runs above and to the right of another's is better at "
    "every moment. The dashed line is the equal domain accuracy."
)
CURVES = ("domain", "general", "memorised")
LOSS_CAPTIONS = {
    "training loss": "Plain cross-entropy under every loss, mean since the checkpoint before. A "
    "low loss can also mean that the model knows faulty rows by heart.",
}


def views(experiment: Experiment) -> list[tuple[str, str, Chosen]]:
    """Title, caption and points of each comparison."""
    threshold = experiment.domain_accuracy
    updates = {plan.updates for plan in experiment.plans.values()}
    equal_caption = (
        f"The first checkpoint of each run that reaches {threshold:.1%} of the domain; "
        "runs that never do are left out."
    )
    return [
        (
            "At equal steps" if len(updates) == 1 else "After the last update",
            END_CAPTION,
            at_the_end(experiment.curves),
        ),
        (
            f"At equal domain accuracy ({threshold:.1%})",
            equal_caption,
            at_domain_accuracy(experiment.curves, threshold),
        ),
    ]


def tables(experiment: Experiment) -> list[Table]:
    """The tables of the results, in reading order."""
    found = []
    for title, caption, chosen in views(experiment):
        found.append(result_table(experiment, title, chosen, caption))
        found.append(difference_table(experiment, title, chosen))
    title, _, at_the_last = views(experiment)[0]
    found.insert(1, base_difference_table(experiment, title, at_the_last))
    found += loss_table(experiment)
    if experiment.drawn:
        found.append(drawn_table(experiment))
    return [table for table in found if table.rows]


def details(experiment: Experiment) -> list[Table]:
    """Tables by task and by kind of fault, if there are several."""
    return [
        table
        for title, _, chosen in views(experiment)
        for table in detail_tables(experiment, title, chosen)
    ]


def print_experiment(experiment: Experiment, folder: CompareDir) -> None:
    """Print tables, notes and the paths of the results."""
    shown = [*tables(experiment), *details(experiment)]
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
        KeyFigures(_key_figures(experiment)),
        Plot(
            "The cost of learning",
            forgetting_plane(
                {arm: _path(experiment, arm) for arm in experiment.curves},
                PlanePoint(0.0, experiment.bases[experiment.arms[0].name].figures["domain"]),
                experiment.domain_accuracy,
            ),
            PLANE_CAPTION,
        ),
        *tables(experiment),
        *details(experiment),
        *_curve_blocks(experiment),
        arms_table(experiment.arms, experiment.plans),
        *(
            [Text("\n\n".join(experiment.notes), "Differences between runs")]
            if experiment.notes
            else []
        ),
        *([failure_table(experiment.failures)] if experiment.failures else []),
        Code("Recipe", recipe_to_yaml(recipe)),
    ]
    seeds = ", ".join(map(str, experiment.seeds))
    word = "seed" if len(experiment.seeds) == 1 else "seeds"
    subtitle = f"yrunner compare: {counted(len(experiment.arms), 'arm')}, {word} {seeds}"
    write_report(Report(experiment.name, blocks, subtitle=subtitle), folder.page)


def _key_figures(experiment: Experiment) -> list[tuple[str, str, str]]:
    """The arm that forgot least at equal domain accuracy, and the one that learned most."""
    equal = at_domain_accuracy(experiment.curves, experiment.domain_accuracy)
    reached = {
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
        ("arms that reached it", f"{len(reached)} of {len(experiment.arms)}", f"to {threshold}"),
    ]
    if reached:
        least = max(reached, key=lambda arm: reached[arm].mean)
        points = percent(reached[least], signed=True)
        note = f"{points} points of the general side at {threshold}"
        figures.append(("forgot least", least, note))
    return figures


def _path(experiment: Experiment, arm: str) -> list[PlanePoint]:
    """Forgetting and domain of an arm at each checkpoint, mean over the seeds."""
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
    for words, find, unit in _logged(experiment):
        losses = {arm: find(experiment, arm) for arm in experiment.curves}
        if any(losses.values()):
            drawn = curves_of_arms(losses, f"{words}{unit}", is_share=False)
            blocks.append(Plot(f"Over the updates: {words}", drawn, LOSS_CAPTIONS.get(words, "")))
    return blocks


def _logged(experiment: Experiment) -> list[tuple[str, Callable[..., list[CurvePoint]], str]]:
    """What the training logs have curves of: rewards, or losses and their unit."""
    if experiment.drawn:
        return [
            ("validation reward", partial(_validation, figure="eval_reward"), ""),
            ("reward of the answers drawn", partial(_training, figure="reward"), ""),
        ]
    unit = " (nats per target)"
    return [("validation loss", _validation, unit), ("training loss", _training, unit)]


def _curve(experiment: Experiment, arm: str, measure: str) -> list[CurvePoint]:
    by_step = _by_step(experiment, arm)
    if not by_step:
        return []
    found = [_curve_point(0, [experiment.bases[arm].figures[measure]])]
    for step, points in by_step.items():
        found.append(_curve_point(step, [point.figures[measure] for point in points]))
    return found


def _validation(experiment: Experiment, arm: str, figure: str = "eval_loss") -> list[CurvePoint]:
    losses: dict[int, list[float]] = {}
    for records in experiment.losses[arm].values():
        for record in records:
            if figure in record:
                losses.setdefault(record["step"], []).append(record[figure])
    return [_curve_point(step, values) for step, values in sorted(losses.items())]


def _training(experiment: Experiment, arm: str, figure: str = "loss") -> list[CurvePoint]:
    """Mean since the previous checkpoint, because single updates are noisy."""
    curve, earlier = [], 0
    for step in _by_step(experiment, arm):
        stretches = [
            [each[figure] for each in run if figure in each and earlier < each["step"] <= step]
            for run in experiment.losses[arm].values()
        ]
        earlier = step
        if means := [fmean(stretch) for stretch in stretches if stretch]:
            curve.append(_curve_point(step, means))
    return curve


def _curve_point(step: int, values: Iterable[float]) -> CurvePoint:
    known = list(values)
    return CurvePoint(step, fmean(known), min(known), max(known))
