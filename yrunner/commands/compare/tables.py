"""The tables of an experiment, for the terminal, the report and compare.json."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeVar

from yrunner.commands.compare.figures import (
    Between,
    Chosen,
    Curves,
    Losses,
    Spread,
    at_domain_accuracy,
    at_the_end,
    at_validation_loss,
    differences,
    differences_to_base,
    forgetting,
    loss_threshold,
    measure_spread,
    spread,
)
from yrunner.commands.compare.jobs import Failure
from yrunner.commands.compare.plan import PlanFacts
from yrunner.commands.compare.points import Point
from yrunner.console import Cell
from yrunner.evaluation.results import Difference
from yrunner.recipe.arms import Arm
from yrunner.reports.html import Table
from yrunner.rewards.facts import Drawn
from yrunner.training.metrics import Record

MEASURE_WORDS = {
    "domain": "domain",
    "general": "general",
    "quality": "quality",
    "memorised": "memorised faults",
    "corrected": "corrected faults",
    "repetition_3": "3-gram repetition",
    "repetition_4": "4-gram repetition",
}
"""Column titles in order; forgetting comes after `general`."""
TESTED = ("domain", "general", "quality", "memorised")
"""Measures whose differences are tested; forgetting differs as `general` does."""
DIFFERENCE_CAPTION = (
    "In percentage points, each arm minus the first. The interval is a 95 % paired bootstrap "
    "over questions and seeds; * marks an interval without 0. Text quality is compared at equal "
    "length, answer by answer."
)
BASE_CAPTION = "The same, each arm minus its base: what the training has changed."
TASK_CAPTION = "In percent, the main figure of each task; a side above is the mean of its tasks."
BESIDE = ("length", "kl")
BESIDE_CAPTION = (
    "By task of the general side: mean length of an answer in words or Chinese characters, and KL "
    "to the base in nats per token, over the base's own answers."
)
LOSS_CAPTION = (
    "Each run where its validation loss first falls to this, between two checkpoints, or between "
    "the base and the first one. Figures are interpolated, linearly in the logarithm of the loss: "
    "of the sides and faults in percent, of the others as they are. Runs that never get there are "
    "left out."
)
FAULT_CAPTION = (
    "In percent of the faulty rows of each kind: those whose wrong answer the model gives."
)

WHEN = ("first", "last")
SUM = "sum, less penalties"
DRAWN_CAPTION = (
    "What the rewards said of the answers that a run drew in the first and in the last twentieth "
    "of its cycles: mean score before the weight, and percent with full marks. Mean and sample "
    "standard deviation over the seeds."
)

Details = Callable[[Point], Mapping[str, float]]
"""Finer figures of a point, by column title."""
AnyPoint = TypeVar("AnyPoint", Point, Between)


@dataclass(frozen=True)
class Experiment:
    """The plans and results of an experiment."""

    name: str
    arms: Sequence[Arm]
    seeds: Sequence[int]
    plans: Mapping[str, PlanFacts]
    curves: Curves
    """The points of the measured runs."""
    bases: Mapping[str, Point]
    """The base of each arm."""
    domain_accuracy: float
    """The accuracy at which arms count as equal."""
    losses: Mapping[str, Mapping[int, Sequence[Record]]]
    """The training logs by arm and seed. The `eval_loss` of update 0 is that of the base."""
    validation_loss: float | None = None
    """The validation loss at which arms count as equal; None: the one that every run reaches."""
    drawn: Mapping[str, Mapping[int, tuple[Drawn, Drawn]]] = field(default_factory=dict)
    """For `train.stage: rl`, by arm and seed: answers of the beginning and of the end."""
    notes: Sequence[str] = ()
    failures: Mapping[str, Failure] = field(default_factory=dict)
    """By run."""

    @property
    def measures(self) -> list[str]:
        """The measures that were taken, in table order."""
        base = next(iter(self.bases.values()))
        return [measure for measure in MEASURE_WORDS if measure in base.figures]

    @property
    def at_validation_loss(self) -> tuple[float, Mapping[str, Mapping[int, Between]]] | None:
        """That loss, and each run there; None if the base's loss of a run is not known."""
        losses: Losses = {
            arm: {
                seed: {each["step"]: each["eval_loss"] for each in records if "eval_loss" in each}
                for seed, records in runs.items()
            }
            for arm, runs in self.losses.items()
        }
        if not all(0 in losses[arm].get(seed, {}) for arm in losses for seed in self.curves[arm]):
            return None
        given = self.validation_loss
        threshold = loss_threshold(losses) if given is None else given
        chosen = at_validation_loss(
            self.curves,
            self.bases,
            losses,
            threshold,
            lambda point: {**point.figures, **beside_base(point)},
        )
        return threshold, chosen


def arms_table(arms: Sequence[Arm], plans: Mapping[str, PlanFacts]) -> Table:
    """What each arm changes and trains on."""
    rows: list[tuple[Cell, ...]] = []
    for arm in arms:
        plan = plans[arm.name]
        changes = "\n".join(arm.overrides) or "nothing"
        rows.append((arm.name, changes, plan.updates, plan.targets, plan.rows))
    unit = next(iter(plans.values())).unit
    caption = f"Updates, {unit} learned from (counted each time) and different rows of one run."
    return Table("Arms", ("arm", "changes", "updates", unit, "rows"), rows, caption)


def drawn_table(experiment: Experiment) -> Table:
    """What the rewards said of the answers of each arm, at the beginning and at the end."""
    rows: list[tuple[Cell, ...]] = []
    for arm, runs in experiment.drawn.items():
        figures = drawn_spreads(list(runs.values()))
        names = dict.fromkeys(name for name, _ in figures)
        rows += [
            (
                arm,
                name,
                *(plain(figures.get((name, f"mean {when}"))) for when in WHEN),
                *(percent(figures.get((name, f"full marks {when}"))) for when in WHEN),
            )
            for name in names
        ]
    columns = ("arm", "reward", "mean, first", "last", "full marks, first", "last")
    return Table("Answers drawn", columns, rows, DRAWN_CAPTION)


def drawn_spreads(runs: Sequence[tuple[Drawn, Drawn]]) -> dict[tuple[str, str], Spread]:
    """By reward and figure, over the seeds of an arm; the sum of all has a mean alone."""
    found: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        for when, drawn in zip(WHEN, run, strict=True):
            for name, value in drawn.means.items():
                found.setdefault((name, f"mean {when}"), []).append(value)
            for name, value in drawn.whole.items():
                found.setdefault((name, f"full marks {when}"), []).append(value)
        for when, drawn in zip(WHEN, run, strict=True):
            if drawn.reward is not None:
                found.setdefault((SUM, f"mean {when}"), []).append(drawn.reward)
    spreads = {key: spread(values) for key, values in found.items()}
    return {key: each for key, each in spreads.items() if each is not None}


def result_table(experiment: Experiment, title: str, chosen: Chosen, caption: str) -> Table:
    """The figures of the base and of each arm at its chosen points, over the seeds."""
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


def loss_table(experiment: Experiment) -> list[Table]:
    """The figures of each arm where its runs have the same validation loss, if that is known."""
    found = experiment.at_validation_loss
    if found is None:
        return []
    threshold, chosen = found
    base = experiment.bases[experiment.arms[0].name]
    others = list(beside_base(base))
    columns = [*(MEASURE_WORDS[measure] for measure in experiment.measures), *others]
    rows: list[list[Cell]] = []
    for arm, points in chosen.items():
        spreads = detail_spreads(points, attrgetter("figures"))
        runs = f"{len(points)} of {len(experiment.seeds)}"
        update = spread(point.step for point in points.values())
        rows.append(
            [
                arm,
                runs,
                f"{update.mean:,.0f}" if update else None,
                *(percent(spreads.get(measure)) for measure in experiment.measures),
                *(plain(spreads.get(name)) for name in others),
            ]
        )
    title = f"At equal validation loss ({threshold:.3g} nats)"
    return [Table(title, ["arm", "runs", "update", *columns], rows, LOSS_CAPTION)]


def difference_table(experiment: Experiment, title: str, chosen: Chosen) -> Table:
    """Each arm minus the first, with confidence intervals."""
    first, *others = chosen
    seeds = {arm: len(chosen[first].keys() & chosen[arm].keys()) for arm in others}
    by_measure = {measure: differences(chosen, measure) for measure in _tested(experiment)}
    name = f"{title}: compared with {first}"
    return _table_of_differences(name, seeds, by_measure, DIFFERENCE_CAPTION)


def base_difference_table(experiment: Experiment, title: str, chosen: Chosen) -> Table:
    """Each arm minus its base, with confidence intervals."""
    seeds = {arm: len(points) for arm, points in chosen.items()}
    by_measure = {
        measure: differences_to_base(chosen, experiment.bases, measure)
        for measure in _tested(experiment)
    }
    name = f"{title}: compared with the base"
    return _table_of_differences(name, seeds, by_measure, BASE_CAPTION)


def _tested(experiment: Experiment) -> list[str]:
    return [measure for measure in TESTED if measure in experiment.measures]


def _table_of_differences(
    title: str,
    seeds: Mapping[str, int],
    by_measure: Mapping[str, Mapping[str, Difference | None]],
    caption: str,
) -> Table:
    """A row for each arm in `seeds`, which counts them."""
    columns = ["arm", "seeds"]
    for measure in by_measure:
        columns += [MEASURE_WORDS[measure], "95 %"]
    rows = []
    for arm, number in seeds.items():
        row: list[Cell] = [arm, number]
        for by_arm in by_measure.values():
            row += _difference_cells(by_arm[arm])
        rows.append(row)
    return Table(title, columns, rows, caption)


def failure_table(failures: Mapping[str, Failure]) -> Table:
    """Which runs failed, and why."""
    rows = [(name, failure.message, str(failure.log)) for name, failure in failures.items()]
    return Table("Failed", ("run", "why", "log"), rows)


def percent(figure: Spread | None, *, signed: bool = False) -> str | None:
    """`88.9 ± 2.1`; without a deviation for one seed; None without a figure."""
    if figure is None:
        return None
    mean = f"{100 * figure.mean:{'+' if signed else ''}.1f}"
    return mean if figure.deviation is None else f"{mean} ± {100 * figure.deviation:.1f}"


def plain(figure: Spread | None) -> str | None:
    """The same for a figure that is not a share."""
    if figure is None:
        return None
    mean = f"{figure.mean:.3g}"
    return mean if figure.deviation is None else f"{mean} ± {figure.deviation:.2g}"


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
    # Non-breaking spaces keep an interval on one line.
    return [value, f"{low} to {high}{star}".replace(" ", "\N{NO-BREAK SPACE}")]


def detail_tables(experiment: Experiment, title: str, chosen: Chosen) -> list[Table]:
    """A table by task and one by kind of fault, if there are several."""
    base = next(iter(experiment.bases.values()))
    wanted = [
        (f"{title}: by task", task_shares, TASK_CAPTION, len(task_shares(base)) > 2),
        (f"{title}: memorised, by kind", fault_shares, FAULT_CAPTION, len(fault_shares(base)) > 1),
    ]
    found = [
        _table(experiment, name, chosen, details, caption)
        for name, details, caption, has_several in wanted
        if has_several
    ]
    if beside_base(base):
        name = f"{title}: beside the base"
        found.append(_table(experiment, name, chosen, beside_base, BESIDE_CAPTION, plain))
    return found


def task_shares(point: Point) -> dict[str, float]:
    """The main figure of each task, sorted by side."""
    tasks = sorted(point.results.tasks.items(), key=lambda item: item[1].side)
    return {name: task.figures[task.headline] for name, task in tasks}


def beside_base(point: Point) -> dict[str, float]:
    """Length of the answers and KL to the base, by task of the general side."""
    return {
        f"{name}: {figure}": task.figures[figure]
        for name, task in point.results.tasks.items()
        if task.side == "general"
        for figure in BESIDE
        if figure in task.figures
    }


def fault_shares(point: Point) -> dict[str, float]:
    """The memorised share of each kind of fault; empty if the list has no kinds."""
    faults = point.results.faults
    return {} if faults is None else faults.by_kind


def detail_spreads(
    points: Mapping[int, AnyPoint], details: Callable[[AnyPoint], Mapping[str, float]]
) -> dict[str, Spread]:
    """Finer figures of an arm over its seeds."""
    shares = [details(point) for point in points.values()]
    names = shares[0] if shares else ()
    found = {name: spread(share[name] for share in shares) for name in names}
    return {name: each for name, each in found.items() if each is not None}


def _table(
    experiment: Experiment,
    title: str,
    chosen: Chosen,
    details: Details,
    caption: str,
    show: Callable[[Spread | None], str | None] = percent,
) -> Table:
    first = experiment.bases[experiment.arms[0].name]
    columns = list(details(first))
    base = [show(Spread(share, None)) for share in details(first).values()]
    rows: list[list[Cell]] = [["(base)", *base]]
    for arm, points in chosen.items():
        spreads = detail_spreads(points, details)
        rows.append([arm, *(show(spreads.get(column)) for column in columns)])
    return Table(title, ["arm", *columns], rows, caption)


def as_json(experiment: Experiment) -> dict[str, Any]:
    """Content of compare.json: each arm's points by seed, at the end, at equal accuracy and loss.

    Shares, not percent. `minus_the_first` has the mean difference to the first arm and the ends of
    its 95 % interval, as in `eval.json`; `minus_the_base` that to the base.
    """
    end = at_the_end(experiment.curves)
    equal = at_domain_accuracy(experiment.curves, experiment.domain_accuracy)
    return {
        "name": experiment.name,
        "seeds": list(experiment.seeds),
        "arms": {
            arm.name: {
                "changes": dict(arm.changes),
                "updates": experiment.plans[arm.name].updates,
                "targets": experiment.plans[arm.name].targets,
                "rows": experiment.plans[arm.name].rows,
                "base": _means(experiment, experiment.bases[arm.name]),
                "seeds": {
                    str(seed): [_means(experiment, point) for point in points]
                    for seed, points in experiment.curves[arm.name].items()
                },
            }
            for arm in experiment.arms
        },
        "answers_drawn": {
            arm: {
                str(seed): {when: vars(one) for when, one in zip(WHEN, each, strict=True)}
                for seed, each in runs.items()
            }
            for arm, runs in experiment.drawn.items()
        },
        "domain_accuracy": experiment.domain_accuracy,
        "at_the_end": _chosen_json(experiment, end),
        "at_domain_accuracy": _chosen_json(experiment, equal),
        **_loss_json(experiment),
        "notes": list(experiment.notes),
        "failures": {name: failure.message for name, failure in experiment.failures.items()},
    }


def _loss_json(experiment: Experiment) -> dict[str, Any]:
    found = experiment.at_validation_loss
    if found is None:
        return {}
    threshold, chosen = found
    arms = {
        arm: {
            "steps": {str(seed): point.step for seed, point in points.items()},
            "figures": {
                name: vars(each)
                for name, each in detail_spreads(points, attrgetter("figures")).items()
            },
        }
        for arm, points in chosen.items()
    }
    return {"validation_loss": threshold, "at_validation_loss": arms}


def _means(experiment: Experiment, point: Point) -> dict[str, float]:
    return {"step": point.step, **{name: point.figures[name] for name in experiment.measures}}


def _chosen_json(experiment: Experiment, chosen: Chosen) -> dict[str, Any]:
    tested = _tested(experiment)
    to_first = {measure: differences(chosen, measure) for measure in tested}
    bases = experiment.bases
    to_base = {measure: differences_to_base(chosen, bases, measure) for measure in tested}
    found: dict[str, Any] = {}
    for arm, points in chosen.items():
        spreads = {name: measure_spread(points, name) for name in experiment.measures}
        spreads["forgetting"] = forgetting(points, experiment.bases[arm])
        found[arm] = {
            "steps": {str(seed): point.step for seed, point in points.items()},
            "figures": {name: vars(each) for name, each in spreads.items() if each},
            "tasks": _details_json(points, task_shares),
            "beside_base": _details_json(points, beside_base),
            "memorised_by_kind": _details_json(points, fault_shares),
            "minus_the_first": _differences_json(to_first, arm),
            "minus_the_base": _differences_json(to_base, arm),
        }
    return found


def _differences_json(
    by_measure: Mapping[str, Mapping[str, Difference | None]], arm: str
) -> dict[str, Any]:
    return {
        measure: difference.as_json()
        for measure, by_arm in by_measure.items()
        if (difference := by_arm.get(arm)) is not None
    }


def _details_json(points: Mapping[int, Point], details: Details) -> dict[str, Any]:
    return {name: vars(each) for name, each in detail_spreads(points, details).items()}
