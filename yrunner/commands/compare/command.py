"""`yrun compare`: train and measure one recipe in several versions, and compare them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from yrunner.assembly.measure import Measured
from yrunner.assembly.rl.rollouts import read_rollouts
from yrunner.assembly.run import Run
from yrunner.commands.compare.figures import domain_threshold
from yrunner.commands.compare.jobs import Failure, environments_for, run_jobs
from yrunner.commands.compare.measure import check_questions
from yrunner.commands.compare.plan import PlanFacts, environment_notes, fairness_notes, plan_facts
from yrunner.commands.compare.points import Measurement, Point
from yrunner.commands.compare.report import print_experiment, write_experiment
from yrunner.commands.compare.runs import (
    ArmRun,
    base_jobs,
    base_name,
    plan_runs,
    refuse_changed,
    sort_jobs,
    sort_name,
)
from yrunner.commands.compare.tables import Experiment, arms_table
from yrunner.console import counted, print_table, say
from yrunner.errors import RunError, YRunnerError
from yrunner.recipe.arms import Arm, choose_arms, read_seeds
from yrunner.recipe.load import load_recipe
from yrunner.recipe.schema.recipe import Recipe
from yrunner.rewards.facts import Drawn, first_and_last
from yrunner.storage.run_dir import CompareDir
from yrunner.training.metrics import Record, read_metrics


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

    Finished work is reused. Raises `RunError` at the end if runs have failed; the others are in
    the report.
    """
    recipe = load_recipe(path, list(overrides))
    _check(path, Run(recipe))
    arms = choose_arms(path, overrides, vary=vary, only=only)
    used_seeds = recipe.compare.seeds if seeds is None else read_seeds(seeds)
    runs = plan_runs(path, overrides, arms, used_seeds)
    changed = [run for run in runs if run.changes()]
    if changed and not overwrite:
        refuse_changed(changed)
    plans = {run.arm: plan_facts(Run(run.recipe)) for run in runs[: len(arms)]}
    options = _CompareOptions(
        recipe, list(arms), used_seeds, runs, changed, plans, fairness_notes(plans)
    )
    _say_options(options)
    failures = _run_all(options, jobs)
    experiment = _collect(options, failures)
    write_experiment(experiment, recipe, options.folder)
    print_experiment(experiment, options.folder)
    if failures:
        raise RunError(
            f"{len(failures)} of {len(runs)} runs failed: {_first(failures)}",
            remedy="fix the cause and run the same command again; finished work is reused",
        )


@dataclass(frozen=True)
class _CompareOptions:
    """What to compare."""

    recipe: Recipe
    arms: Sequence[Arm]
    seeds: Sequence[int]
    runs: Sequence[ArmRun]
    changed: Sequence[ArmRun]
    """Runs that exist with other settings and are trained again."""
    plans: Mapping[str, PlanFacts]
    """By arm."""
    notes: Sequence[str]

    @property
    def folder(self) -> CompareDir:
        """The folder of the experiment."""
        return CompareDir(self.recipe.run_folder)


def _check(path: Path, run: Run) -> None:
    """Refuse recipes that cannot be compared, and faulty questions, before training."""
    if run.recipe.model.base is None:
        raise YRunnerError(
            f"{path} builds a new model, which cannot forget anything",
            remedy="compare recipes that start from a base",
        )
    if run.recipe.train.stage == "reward":
        raise YRunnerError(
            f"{path} makes a reward model, which answers no questions",
            remedy="compare its validation losses: eval_loss in metrics.jsonl",
        )
    check_questions(run)


def _say_options(options: _CompareOptions) -> None:
    table = arms_table(options.arms, options.plans)
    print_table(table.title, table.columns, table.rows)
    say(f"seeds {', '.join(map(str, options.seeds))}: {counted(len(options.runs), 'run')}")
    for note in options.notes:
        say(f"note: {note}")


def _run_all(options: _CompareOptions, jobs: int) -> dict[str, Failure]:
    """Run unfinished jobs, sorts and bases first; an arm without its own cannot run."""
    environments = environments_for(jobs)
    failed_sorts = run_jobs("sorts", sort_jobs(options.runs, options.folder), environments[:1])
    failed_bases = run_jobs("bases", base_jobs(options.runs, options.folder), environments[:1])
    pending = [run for run in options.runs if run in options.changed or run.measurement is None]
    say(f"runs already finished: {len(options.runs) - len(pending):,} of {len(options.runs):,}")
    bases = {run.name: base_name(run.recipe) for run in pending}
    failures = {run: failed_bases[base] for run, base in bases.items() if base in failed_bases}
    for run in pending if failed_sorts else ():
        names = [sort_name(sorting.recipe) for sorting in Run(run.recipe).sorts]
        failed = next((name for name in names if name in failed_sorts), None)
        if failed is not None:
            failures[run.name] = failed_sorts[failed]
    work = [
        run.job(options.plans[run.arm].updates, anew=run in options.changed)
        for run in pending
        if run.name not in failures
    ]
    return failures | run_jobs(f"updates of {counted(len(work), 'run')}", work, environments)


def _collect(options: _CompareOptions, failures: Mapping[str, Failure]) -> Experiment:
    """Read the results of the runs. Raises `RunError` if all have failed."""
    curves: dict[str, dict[int, tuple[Point, ...]]] = {}
    losses: dict[str, dict[int, list[Record]]] = {}
    bases: dict[str, Point] = {}
    run_dirs = {}
    drawn: dict[str, dict[int, tuple[Drawn, Drawn]]] = {}
    for run in options.runs:
        base = Measurement.load(options.folder.base(base_name(run.recipe)))
        measurement = run.measurement
        if base is not None and measurement is not None:
            bases[run.arm] = base.points[0]
            curves.setdefault(run.arm, {})[run.seed] = measurement.points
            losses.setdefault(run.arm, {})[run.seed] = _training_log(run)
            run_dirs[run.name] = run.run_dir
            found = first_and_last(read_rollouts(run.run_dir.rollouts), run.recipe.rewards)
            if found is not None:
                drawn.setdefault(run.arm, {})[run.seed] = found
    if not curves:
        raise RunError(
            f"all {len(options.runs)} runs failed: {_first(failures)}",
            remedy="fix the cause and run the same command again",
        )
    threshold = options.recipe.compare.domain_accuracy
    return Experiment(
        name=options.recipe.name,
        arms=[arm for arm in options.arms if arm.name in curves],
        seeds=options.seeds,
        plans=options.plans,
        curves={arm.name: curves[arm.name] for arm in options.arms if arm.name in curves},
        bases=bases,
        domain_accuracy=domain_threshold(curves) if threshold is None else threshold,
        validation_loss=options.recipe.compare.validation_loss,
        losses=losses,
        drawn=drawn,
        notes=[*options.notes, *environment_notes(run_dirs)],
        failures=failures,
    )


def _training_log(run: ArmRun) -> list[Record]:
    """Its records, after one of the base's validation loss, if the run measured that.

    Runs on pairs, rewards or a teacher validate with another loss than the one measured before.
    """
    records = read_metrics(run.run_dir.metrics)
    is_plain = run.recipe.train.stage in ("sft", "cpt") and run.recipe.teacher is None
    if not is_plain or not any("eval_loss" in each for each in records):
        return records
    before = Measured.load(run.run_dir.before).token_losses
    return [{"step": 0, "eval_loss": fmean(before)}, *records] if before else records


def _first(failures: Mapping[str, Failure]) -> str:
    name, failure = next(iter(failures.items()))
    return f"{name}: {failure.message} (see {failure.log})"
