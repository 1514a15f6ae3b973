"""The runs of an experiment, one per arm and seed: what is finished, and the jobs that remain."""

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

from yrunner.assembly.identity import changes_since, fingerprint
from yrunner.assembly.run import Run
from yrunner.commands.compare.jobs import Command, Job
from yrunner.commands.compare.measure import measure_key
from yrunner.commands.compare.points import Measurement
from yrunner.console import counted
from yrunner.errors import RunError
from yrunner.recipe.arms import Arm
from yrunner.recipe.load import load_recipe
from yrunner.recipe.schema.recipe import Recipe
from yrunner.storage.run_dir import CompareDir, RunDir

YRUN = (sys.executable, "-m", "yrunner.cli")
ALL_CHECKPOINTS = 10**6
"""`train.checkpoint.keep` of an arm: checkpoints stay until they are measured."""


@dataclass(frozen=True, eq=False)
class ArmRun:
    """One arm and one seed."""

    arm: str
    seed: int
    recipe: Recipe
    """With everything that the experiment sets, including the run folder."""
    arguments: tuple[str, ...]
    """The recipe's path and the overrides of this run."""

    @property
    def name(self) -> str:
        """Used for its folder, its log and its table row."""
        return run_name(self.arm, self.seed)

    @property
    def run_dir(self) -> RunDir:
        """The run folder."""
        return RunDir(self.recipe.run_folder)

    @property
    def measurement(self) -> Measurement | None:
        """Its measurement; None until it is complete."""
        found = Measurement.load(self.run_dir.measured)
        is_done = found is not None and found.is_complete and found.key == measure_key(self.recipe)
        return found if is_done and self.run_dir.is_finished() else None

    def changes(self) -> list[str]:
        """Settings of the run in its folder that differ and require training again."""
        if not self.run_dir.fingerprint.exists():
            return []
        changes = changes_since(self.run_dir, self.recipe)
        found = Measurement.load(self.run_dir.measured)
        if found is not None and found.key != measure_key(self.recipe):
            # Without its checkpoints the curve cannot be measured again.
            if set(found.steps) - set(self.run_dir.saved_steps()):
                changes.append("eval, or its files")
        return changes

    def job(self, updates: int, *, anew: bool) -> Job:
        """The remaining work: training, from a checkpoint if there is one, and measuring."""
        measure: Command = (*YRUN, "measure", *self.arguments)
        # Tasks are run afterwards on every checkpoint, and once on the base for all arms.
        train: Command = (*YRUN, "train", *self.arguments, "eval.tasks=[]")
        if self.run_dir.is_finished() and not anew:
            commands, updates = [measure], 0
        elif self.run_dir.saved_steps() and not anew:
            commands = [(*train, "--resume"), measure]
        else:
            # The folder has no checkpoint, or is to be replaced.
            replacing = ["--overwrite"] if self.run_dir.is_used() else []
            commands = [(*train, *replacing), measure]
        log = CompareDir(self.run_dir.folder.parents[1]).log(self.name)
        return Job(self.name, tuple(commands), log, self.run_dir.metrics, updates)


def run_name(arm: str, seed: int) -> str:
    """The name of a run."""
    return f"{arm}-seed-{seed}"


def plan_runs(
    path: Path, overrides: Sequence[str], arms: Mapping[Arm, Recipe], seeds: Sequence[int]
) -> list[ArmRun]:
    """Every arm with every seed, seed by seed."""
    runs = []
    for seed in seeds:
        for arm, recipe in arms.items():
            name = run_name(arm.name, seed)
            folder = CompareDir(recipe.run_folder).run(name).folder
            own = [
                *overrides,
                *arm.overrides,
                f"name={json.dumps(f'{recipe.name}-{name}')}",
                f"seed={seed}",
                f"output={json.dumps(str(folder), ensure_ascii=False)}",
                f"train.checkpoint.keep={ALL_CHECKPOINTS}",
            ]
            runs.append(ArmRun(arm.name, seed, load_recipe(path, own), (str(path), *own)))
    return runs


def refuse_changed(changed: Sequence[ArmRun]) -> NoReturn:
    """Raise `RunError`: these folders have runs with other settings, which may be valuable."""
    first = changed[0]
    others = f" (and {counted(len(changed) - 1, 'more run')})" if len(changed) > 1 else ""
    unsorted = [
        f"yrun sort {sorting.options.arguments}"
        for sorting in Run(first.recipe).sorts
        if sorting.stale_sort() is not None
    ]
    # Without the sort, the run's rows seem to be all of the file.
    what = "; ".join(unsorted)
    sort_first = f"run `{what}`, whose result is missing or old, or " if unsorted else ""
    raise RunError(
        f"{first.run_dir.folder} was trained with other settings: "
        f"{', '.join(first.changes())}{others}",
        remedy=f"{sort_first}set them back, give the recipe another output, or train these runs "
        "again with --overwrite",
    )


def base_name(recipe: Recipe) -> str:
    """A name by base and what is measured: arms with the same name share the measurement."""
    what = [measure_key(recipe), recipe.model.base, fingerprint(recipe)["base"]]
    return f"base-{sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]}"


def base_jobs(runs: Sequence[ArmRun], folder: CompareDir) -> list[Job]:
    """Jobs before the arms: train and measure each base, train teachers and reward models."""
    jobs: dict[str, Job] = {}
    trained: set[str | None] = set()
    for run in runs:
        name, base = base_name(run.recipe), run.recipe.model.base
        file = folder.base(name)
        start = Run(run.recipe)
        if name in jobs or (start.stale_base is None and file.exists()):
            continue
        commands: list[Command] = [(*YRUN, "measure", *run.arguments, "--base", str(file))]
        if start.base is not None and start.stale_base is not None and base not in trained:
            commands.insert(0, (*YRUN, "train", str(base), *_how(start.base)))
            trained.add(base)
        jobs[name] = Job(name, tuple(commands), folder.log(name))
    for run in runs:
        teacher = Run(run.recipe).untrained_teacher
        if run.recipe.teacher is None or teacher is None:
            continue
        name = f"teacher-{teacher.recipe.name}"
        command: Command = (*YRUN, "train", run.recipe.teacher.model, *_how(teacher))
        jobs[name] = Job(name, (command,), folder.log(name))
    for judge, name in _untrained_judges(runs):
        command = (*YRUN, "train", judge.options.arguments, *_how(judge))
        jobs[name] = Job(name, (command,), folder.log(name))
    return list(jobs.values())


def _untrained_judges(runs: Sequence[ArmRun]) -> Iterator[tuple[Run, str]]:
    for run in runs:
        for judge, _ in Run(run.recipe).untrained_judges:
            yield judge, f"reward-model-{judge.recipe.name}"


def sort_jobs(runs: Sequence[ArmRun], folder: CompareDir) -> list[Job]:
    """Jobs before the bases: sort the rows that arms learn from, each corpus once."""
    jobs: dict[str, Job] = {}
    for run in runs:
        for sorting in Run(run.recipe).sorts:
            path = sorting.options.arguments
            if path not in jobs and sorting.stale_sort() is not None:
                command: Command = (*YRUN, "sort", *shlex.split(path), "--overwrite")
                name = sort_name(sorting.recipe)
                jobs[path] = Job(name, (command,), folder.log(name))
    return list(jobs.values())


def sort_name(recipe: Recipe) -> str:
    """The name of the job that sorts the rows of a recipe."""
    return f"sort-{recipe.name}"


def _how(base: Run) -> list[str]:
    """Resume a base or teacher that was not finished, replace one that has changed."""
    if not base.folder.is_used():
        return []
    return ["--resume"] if base.can_resume() else ["--overwrite"]
