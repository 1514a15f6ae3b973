"""Does NLIRG help? Does replay? Print the tables and draw the plot of the legal experiments.

    yrun compare recipes/legal_compare.yaml
    python -m benchmarks.legal_experiment [KEY=VALUE ...] [--picture plain,nlirg FILE]

Add `--recipe recipes/legal_keep_compare.yaml` for the experiment with replay.

Reads the finished runs of `yrun compare`, trains nothing, and prints Markdown: all arms after the
last update and at equal domain accuracy, forgetting and memorised faults relative to the first arm,
general accuracy by distance from the field, and memorised faults by kind.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.paths import RECIPES, TOY_DATA
from yrunner.commands.compare.figures import (
    Chosen,
    Curves,
    Spread,
    at_domain_accuracy,
    at_the_end,
    differences,
    domain_threshold,
    forgetting,
    measure_spread,
    spread,
)
from yrunner.commands.compare.points import Measurement, Point
from yrunner.commands.compare.runs import base_name, plan_runs
from yrunner.commands.compare.tables import percent
from yrunner.evaluation.results import Difference
from yrunner.recipe.arms import choose_arms
from yrunner.recipe.load import load_recipe
from yrunner.reports.comparison_plots import PlanePoint, forgetting_plane
from yrunner.storage.run_dir import CompareDir

RECIPE = RECIPES / "legal_compare.yaml"
GENERAL_TEST = TOY_DATA / "general_test.jsonl"
DISTANCES = ("near", "middle", "far")
KINDS = ("wrong_article", "swapped_answer", "cut", "typos", "garbled")
MEASURES = ("domain", "general", "memorised", "repetition_3")
MINUS = re.compile(r"-(?=\d)")


@dataclass(frozen=True)
class Experiment:
    """The finished runs of an experiment."""

    curves: Curves
    base: Point
    num_seeds: int
    domain_accuracy: float
    """Domain accuracy at which arms are compared."""


def main() -> None:
    """Print the tables, and draw the plot with --picture."""
    arguments = _parse()
    experiment = load_runs(arguments.recipe, arguments.overrides)
    threshold = experiment.domain_accuracy
    views = {
        "After the last update": at_the_end(experiment.curves),
        f"At equal domain accuracy, {threshold:.1%}": at_domain_accuracy(
            experiment.curves, threshold
        ),
    }
    for title, chosen in views.items():
        _print_figures(title, experiment, chosen)
        _print_differences(title, chosen)
        _print_shares(f"{title}: general accuracy by distance", experiment, chosen, by_distance())
        _print_shares(f"{title}: memorised by kind of fault", experiment, chosen, _by_kind)
    if arguments.picture:
        arms, file = arguments.picture
        Path(file).write_text(_picture(experiment, arms.split(",")) + "\n", "utf-8")
        print(file)


def load_runs(file: Path, overrides: Sequence[str]) -> Experiment:
    """Load the base and the finished runs of every arm that has any."""
    recipe = load_recipe(file, overrides)
    arms = choose_arms(file, overrides, vary=(), only=None)
    curves: dict[str, dict[int, tuple[Point, ...]]] = {}
    runs = plan_runs(file, overrides, arms, recipe.compare.seeds)
    for run in runs:
        if measurement := run.measurement:
            curves.setdefault(run.arm, {})[run.seed] = measurement.points
    base = Measurement.load(CompareDir(recipe.run_folder).base(base_name(runs[0].recipe)))
    if base is None or not curves:
        raise SystemExit(f"no finished runs; run yrun compare {file} first")
    in_order = {arm.name: curves[arm.name] for arm in arms if arm.name in curves}
    threshold = recipe.compare.domain_accuracy or domain_threshold(in_order)
    return Experiment(in_order, base.points[0], len(recipe.compare.seeds), threshold)


def by_distance() -> Callable[[Point], dict[str, float]]:
    """Return a function from a point to its general accuracy at each distance."""
    rows = map(json.loads, GENERAL_TEST.read_text("utf-8").splitlines())
    distances = [row["field"] for row in rows]

    def shares(point: Point) -> dict[str, float]:
        right = point.results.tasks["general"].per_question["exact"]
        pairs = list(zip(distances, right, strict=True))
        return {
            name: fmean(each for distance, each in pairs if distance == name) for name in DISTANCES
        }

    return shares


def _by_kind(point: Point) -> dict[str, float]:
    assert point.results.faults is not None, "the recipe lists faults"
    return {kind: point.results.faults.by_kind[kind] for kind in KINDS}


def _print_figures(title: str, experiment: Experiment, chosen: Chosen) -> None:
    base = experiment.base.figures
    shown = [f"{100 * base[measure]:.1f}" for measure in MEASURES]
    rows = [["(base)", "", "0", *shown, "", "", ""]]
    first = next(iter(chosen.values()))
    for arm, points in chosen.items():
        row = [arm, f"{len(points)} of {experiment.num_seeds}"]
        if points:
            row.append(f"{fmean(point.step for point in points.values()):,.0f}")
            row += [percent(measure_spread(points, measure)) or "" for measure in MEASURES]
            row.append(percent(forgetting(points, experiment.base), signed=True) or "")
            same_seeds = {seed: first[seed] for seed in points if seed in first}
            row += _ratios(_prices(points, experiment.base), _prices(same_seeds, experiment.base))
        rows.append(row)
    columns = ["arm", "runs", "update", "domain", "general", "memorised faults"]
    columns += ["3-gram repetition", "forgetting", "forgetting / plain", "memorised / plain"]
    _print_table(title, columns, rows)


def _prices(points: Mapping[int, Point], base: Point) -> list[Spread | None]:
    """Return forgetting and memorised faults of an arm."""
    return [forgetting(points, base), measure_spread(points, "memorised")]


def _ratios(own: Sequence[Spread | None], first: Sequence[Spread | None]) -> list[str]:
    """Return each mean relative to that of the first arm, where that is not 0."""
    pairs = zip(own, first, strict=True)
    return [f"{one.mean / other.mean:.2f}" if one and other else "" for one, other in pairs]


def _print_differences(title: str, chosen: Chosen) -> None:
    measures = ("domain", "general", "memorised")
    by_measure = {measure: differences(chosen, measure) for measure in measures}
    rows = []
    for arm in list(chosen)[1:]:
        rows.append([arm, *(_format_difference(by_measure[measure][arm]) for measure in measures)])
    first = next(iter(chosen))
    _print_table(
        f"{title}: difference to {first} in points, 95 % interval", ["arm", *measures], rows
    )


def _format_difference(difference: Difference | None) -> str:
    """Format percentage points with their interval; a star where it excludes 0."""
    if difference is None or difference.low is None or difference.high is None:
        return ""
    ends = f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    return f"{100 * difference.value:+.1f} ({ends})" + ("" if difference.is_noise else r" \*")


def _print_shares(
    title: str,
    experiment: Experiment,
    chosen: Chosen,
    shares_of: Callable[[Point], Mapping[str, float]],
) -> None:
    names = list(shares_of(experiment.base))
    rows = [["(base)", *(f"{100 * share:.1f}" for share in shares_of(experiment.base).values())]]
    for arm, points in chosen.items():
        shares = [shares_of(point) for point in points.values()]
        means = [percent(spread(share[name] for share in shares)) or "" for name in names]
        rows.append([arm, *means])
    _print_table(title, ["arm", *names], rows)


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n**{title}**\n")
    for row in (columns, ["---"] * len(columns), *rows):
        filled = [*row, *[""] * (len(columns) - len(row))]
        print(MINUS.sub("\N{MINUS SIGN}", f"| {' | '.join(filled)} |"))


def _picture(experiment: Experiment, arms: Sequence[str]) -> str:
    general = experiment.base.figures["general"]
    paths = {}
    for arm in arms:
        by_step: dict[int, list[Point]] = {}
        for points in experiment.curves[arm].values():
            for point in points:
                by_step.setdefault(point.step, []).append(point)
        paths[arm] = [
            PlanePoint(
                fmean(point.figures["general"] - general for point in points),
                fmean(point.figures["domain"] for point in points),
            )
            for _, points in sorted(by_step.items())
        ]
    base = PlanePoint(0.0, experiment.base.figures["domain"])
    return forgetting_plane(paths, base, experiment.domain_accuracy)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="overrides, the same as for yrun compare")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument(
        "--picture", nargs=2, metavar=("ARMS", "FILE"), help="draw a plot of these arms"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
