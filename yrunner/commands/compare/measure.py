"""`yrun measure`: run a recipe's tasks on every checkpoint of its run, or on its base.

`yrun compare` runs this in a separate process after the training of each arm. Results are saved
after each checkpoint, so that interrupted work resumes there.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from yrunner.assembly.identity import without_folders
from yrunner.assembly.measure import base_of, evaluate, kept_results
from yrunner.assembly.run import Run
from yrunner.commands.compare.plan import due_checkpoints
from yrunner.commands.compare.points import Measurement, Point
from yrunner.console import say
from yrunner.errors import YRunnerError
from yrunner.evaluation.evaluated_model import Deferred
from yrunner.evaluation.results import ModelResults
from yrunner.recipe.schema.eval import FormatTask, HarnessTask, JsonForm, Task
from yrunner.recipe.schema.recipe import Recipe
from yrunner.storage.ownership import remove
from yrunner.storage.run_dir import hash_files

NEEDED_SIDES = ("domain", "general")
SEED_OF_ANSWERS = 0


def measure(path: Path, overrides: Sequence[str], *, base: Path | None) -> None:
    """Measure every checkpoint of a finished run, or its base into the file `base`."""
    run = Run.load(path, overrides)
    if base is None:
        measure_run(run)
    else:
        measure_base(run, base)


def measure_run(run: Run) -> None:
    """Measure the checkpoints that are due and not measured yet, then remove old ones."""
    run.require_result()
    check_questions(run)
    recipe, run_dir = run.recipe, run.folder
    key = measure_key(recipe)
    found = Measurement.load(run_dir.measured)
    measurement = found if found is not None and found.key == key else Measurement(key)
    steps = run_dir.saved_steps()
    for step in due_checkpoints(run, steps):
        if step in measurement.steps:
            continue
        model = run.load_model(run_dir.checkpoint(step))
        results = measure_model(run, model, run.result_tokenizer, f"update {step:,}")
        measurement = replace(measurement, points=(*measurement.points, Point(step, results)))
        measurement.save(run_dir.measured)
        say(_line(measurement.points[-1]))
    if recipe.compare.checkpoints == "last":
        for step in steps[:-1]:
            remove(run_dir.checkpoint(step))
    replace(measurement, is_complete=True).save(run_dir.measured)


def measure_base(run: Run, file: Path) -> None:
    """Measure the recipe's base, as a run with one point at update 0."""
    check_questions(run)
    model = Deferred(run.load_base)
    point = Point(0, measure_model(run, model, run.tokenizer, "the base", is_base=True))
    Measurement(measure_key(run.recipe), (point,), is_complete=True).save(file)
    say(_line(point))


def check_questions(run: Run) -> None:
    """Read the questions of the recipe's tasks, to find faulty files before training.

    Raises `YRunnerError` if a side has no task, and `DataError` for faulty files, including the
    list of faults.
    """
    recipe = run.recipe
    for side in NEEDED_SIDES:
        if not any(task.side == side for task in recipe.eval.tasks):
            raise YRunnerError(
                f"{recipe.name} has no task of side {side} in eval.tasks",
                remedy="add one; a comparison needs tasks of both sides, domain and general",
            )
    run.check_questions()


def measure_model(
    run: Run, model: Any, tokenizer: Any, description: str, *, is_base: bool = False
) -> ModelResults:
    """Evaluate a model as `yrun eval` does.

    Random choices (sampled answers, few-shot examples of the harness) are the same for all models,
    because the seed is not that of the training.
    """
    seeded = run.variant(run.recipe.model_copy(update={"seed": SEED_OF_ANSWERS}))
    return evaluate(
        seeded,
        model,
        tokenizer,
        description,
        kept=kept_results(seeded) if is_base else None,
        base=None if is_base else base_of(seeded, run.tokenizer),
    )


def measure_key(recipe: Recipe) -> str:
    """A hash of what is measured: figures with different keys cannot be compared."""
    files = [file for task in recipe.eval.tasks for file in _files_of(task)]
    if recipe.eval.faults is not None:
        files += [recipe.eval.faults.list, recipe.eval.faults.data]
    if recipe.model.template_file is not None:
        files.append(recipe.model.template_file)
    what = {
        # The batch size changes no answer.
        "eval": recipe.eval.model_dump(mode="json", exclude={"batch_size"}),
        "system": recipe.data.system,
        "model": recipe.model.model_dump(mode="json"),
        "files": list(hash_files(files).values()),
    }
    text = json.dumps(without_folders(what), sort_keys=True, ensure_ascii=False)
    return sha256(text.encode()).hexdigest()[:12]


def _files_of(task: Task) -> list[Path]:
    match task:
        case HarnessTask():
            own = task.include.rglob("*") if task.include else ()
            return sorted(path for path in own if path.is_file())
        case FormatTask(form=JsonForm(json_schema=Path() as schema)):
            return [task.data, schema]
        case _:
            return [task.data]


def _line(point: Point) -> str:
    figures = (f"{measure} {figure:.1%}" for measure, figure in point.figures.items())
    return f"update {point.step:,}: {', '.join(figures)}"
