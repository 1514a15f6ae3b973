"""`yrun compare`: one recipe in several versions, trained, measured and set side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from yrunner.commands.compare_figures import domain_threshold
from yrunner.commands.compare_jobs import Failure, environments_for, run_jobs
from yrunner.commands.compare_measure import read_questions
from yrunner.commands.compare_plan import (
    PlanFacts,
    environment_notes,
    fairness_notes,
    plan_facts,
)
from yrunner.commands.compare_points import Measurement, Point
from yrunner.commands.compare_report import print_experiment, write_experiment
from yrunner.commands.compare_runs import Run, base_jobs, base_key, plan_runs, refuse_changed
from yrunner.commands.compare_tables import Experiment, arms_table
from yrunner.console import print_table, say
from yrunner.errors import RunError, YRunnerError
from yrunner.recipe.arms import Arm, choose_arms, read_seeds
from yrunner.recipe.load import load_recipe
from yrunner.recipe.schema import Recipe
from yrunner.run_dir import CompareDir
from yrunner.training.metrics_file import read_metrics


def compare(
    path: Path,
    overrides: Sequence[str],
    *,
    vary: Sequence[str] = (),
    seeds: str | None = None,
    only: str | None = None,
    jobs: int = 1,
    overwrite: bool = False,
) -> None:
    """Train and measure every arm with every seed, and write one table and one report.

    What is there already is not done again. Raises `RunError` at the end where runs have failed;
    the others are in the report.
    """
    recipe = load_recipe(path, overrides)
    arms = choose_arms(path, overrides, vary=vary, only=only)
    used_seeds = recipe.compare.seeds if seeds is None else read_seeds(seeds)
    _check(path, recipe)
    runs = plan_runs(path, overrides, arms, used_seeds)
    changed = [run for run in runs if run.changes()]
    if changed and not overwrite:
        refuse_changed(changed)
    plans = {run.arm: plan_facts(run.recipe) for run in runs[: len(arms)]}
    notes = fairness_notes(plans)
    _say_plan(list(arms), used_seeds, plans, notes)
    folder = CompareDir(recipe.run_folder)
    failures = _run_all(runs, changed, plans, folder, jobs)
    experiment = _collect(recipe, list(arms), used_seeds, runs, plans, notes, failures, folder)
    write_experiment(experiment, recipe, folder)
    print_experiment(experiment, folder)
    if failures:
        raise RunError(
            f"{len(failures)} of {len(runs)} runs failed: {_first(failures)}",
            remedy="mend the cause and run the same command again: what is done is kept",
        )


def _check(path: Path, recipe: Recipe) -> None:
    """Refuse what cannot be compared, and faulty questions, before anything is trained."""
    if recipe.model.base is None:
        raise YRunnerError(
            f"{path} builds a new model: nothing can be forgotten",
            remedy="compare recipes that start from a base",
        )
    read_questions(recipe)


def _say_plan(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    plans: Mapping[str, PlanFacts],
    notes: Sequence[str],
) -> None:
    table = arms_table(arms, plans)
    print_table(table.title, table.columns, table.rows)
    say(f"each with the seeds {', '.join(map(str, seeds))}: {len(arms) * len(seeds):,} runs")
    for note in notes:
        say(f"note: {note}")


def _run_all(
    runs: Sequence[Run],
    changed: Sequence[Run],
    plans: Mapping[str, PlanFacts],
    folder: CompareDir,
    jobs: int,
) -> dict[str, Failure]:
    """Do what is left to do, the bases first. Raises `RunError` where a base fails."""
    environments = environments_for(jobs)
    failures = run_jobs("bases", base_jobs(runs, folder), environments[:1])
    if failures:
        raise RunError(f"the base could not be measured: {_first(failures)}")
    left = [run for run in runs if run in changed or run.measurement is None]
    say(f"runs that are there already: {len(runs) - len(left):,} of {len(runs):,}")
    work = [run.job(plans[run.arm].updates, anew=run in changed) for run in left]
    return run_jobs(f"updates of {len(work):,} runs", work, environments)


def _collect(
    recipe: Recipe,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    runs: Sequence[Run],
    plans: Mapping[str, PlanFacts],
    notes: Sequence[str],
    failures: Mapping[str, Failure],
    folder: CompareDir,
) -> Experiment:
    """Read what the runs have left. Raises `RunError` where none has left anything."""
    curves: dict[str, dict[int, tuple[Point, ...]]] = {arm.name: {} for arm in arms}
    bases = {}
    measured = []
    for run in runs:
        base = Measurement.load(folder.base(base_key(run.recipe)))
        assert base is not None, "bases are measured first"
        bases[run.arm] = base.points[0]
        if run.measurement is not None:
            curves[run.arm][run.seed] = run.measurement.points
            measured.append(run)
    if not measured:
        raise RunError(
            f"all {len(runs)} runs failed: {_first(failures)}",
            remedy="mend the cause and run the same command again",
        )
    threshold = recipe.compare.domain_accuracy
    return Experiment(
        name=recipe.name,
        arms=arms,
        seeds=seeds,
        plans=plans,
        curves=curves,
        bases=bases,
        domain_accuracy=domain_threshold(curves) if threshold is None else threshold,
        losses={
            arm.name: [read_metrics(run.run_dir.metrics) for run in measured if run.arm == arm.name]
            for arm in arms
        },
        notes=[*notes, *environment_notes({run.name: run.run_dir for run in measured})],
        failures=failures,
    )


def _first(failures: Mapping[str, Failure]) -> str:
    name, failure = next(iter(failures.items()))
    return f"{name}: {failure.message} (see {failure.log})"
