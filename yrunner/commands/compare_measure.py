"""What an experiment measures of one model: the tasks of its recipe, listed faults, repetition.

The only place of `yrun compare` that lets a model answer.
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from yrunner.commands.evaluate import evaluate, known_faults
from yrunner.commands.fingerprint import without_folders
from yrunner.commands.measure import read_tasks
from yrunner.errors import YRunnerError
from yrunner.evaluation.questions import Question
from yrunner.evaluation.results import (
    Difference,
    ModelPairs,
    ModelResults,
    faults_difference,
    side_difference,
    side_score,
)
from yrunner.recipe.schema import Recipe
from yrunner.recipe.schema_eval import FormatTask, HarnessTask, JsonForm, Task
from yrunner.run_dir import hash_files

SIDES = ("domain", "general", "quality")
NEEDED_SIDES = ("domain", "general")
REPETITIONS = ("repetition_3", "repetition_4")
SEED_OF_ANSWERS = 0


def read_questions(recipe: Recipe) -> list[tuple[Task, list[Question]]]:
    """The questions of the recipe's tasks; a faulty file is found before training.

    Raises `YRunnerError` for a recipe without a task of each side, and `DataError` for files, the
    list of faults among them.
    """
    for side in NEEDED_SIDES:
        if not any(task.side == side for task in recipe.eval.tasks):
            raise YRunnerError(
                f"{recipe.name} has no task of side {side} in eval.tasks",
                remedy="an experiment needs both: what is learned, and what must not be forgotten",
            )
    known_faults(recipe)
    return read_tasks(recipe)


def measure_model(
    recipe: Recipe,
    tasks: Sequence[tuple[Task, list[Question]]],
    model: Any,
    tokenizer: Any,
    description: str,
) -> ModelResults:
    """Examine a model as `yrun eval` does, in the tasks that `read_questions` gave.

    What is left to chance (drawn answers, examples of the harness) is drawn alike for all models:
    the seed of a run is that of its training.
    """
    asked = recipe.model_copy(update={"seed": SEED_OF_ANSWERS})
    return evaluate(asked, tasks, model, tokenizer, description)


def figures_of(results: ModelResults) -> dict[str, float]:
    """The figure of each measure that was taken.

    `domain`, `general`, `quality`: the mean over the tasks of a side. `memorised`: the share of
    the faulty rows whose wrong answer comes back; `corrected`: of those that are answered rightly
    all the same. `repetition_3`, `repetition_4`: of n-grams, in everything that was written.
    """
    figures = {side: side_score(results, side) for side in SIDES}
    if results.faults is not None:
        figures["memorised"] = results.faults.memorised
        figures["corrected"] = results.faults.corrected
    figures |= {name: results.quality.get(name) for name in REPETITIONS}
    return {measure: figure for measure, figure in figures.items() if figure is not None}


def difference_in(measure: str, pairs: ModelPairs) -> Difference | None:
    """How far a side, or the share of memorised faults, differs between models, over the pairs."""
    return faults_difference(pairs) if measure == "memorised" else side_difference(pairs, measure)


def measure_key(recipe: Recipe) -> str:
    """Names what is measured: figures of two keys cannot be set against each other."""
    files = [file for task in recipe.eval.tasks for file in _files_of(task)]
    if recipe.eval.faults is not None:
        files += [recipe.eval.faults.list, recipe.eval.faults.data]
    if recipe.model.chat_template is not None:
        files.append(recipe.model.chat_template)
    what = {
        # How many questions are answered at once changes no answer.
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
