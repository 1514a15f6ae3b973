"""One model in all tasks of a recipe: what `yrun eval` and `yrun compare` are made of."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from yrunner.console import progress
from yrunner.evaluation.candidate import Candidate
from yrunner.evaluation.examine import examine
from yrunner.evaluation.faults import KnownFault, find_memorised, read_faults
from yrunner.evaluation.judging import quality_of
from yrunner.evaluation.questions import Question
from yrunner.evaluation.results import ModelResults
from yrunner.evaluation.sharing import is_first
from yrunner.recipe.schema import Recipe
from yrunner.recipe.schema_eval import Task


def evaluate(
    recipe: Recipe,
    tasks: Sequence[tuple[Task, list[Question]]],
    model: Any,
    tokenizer: Any,
    description: str,
) -> ModelResults:
    """Examine a loaded model in every task, and in the recipe's list of faults.

    `tasks` is what `read_tasks` gave. `description` names the model in progress bars and reports.
    """
    candidate = Candidate(
        model,
        tokenizer,
        system=recipe.data.system,
        batch_size=recipe.eval.batch_size,
        generation=recipe.eval.generation,
        seed=recipe.seed,
    )
    results = {
        task.name: examine(task, questions, _watched(candidate, task.name, description))
        for task, questions in tasks
    }
    faults = None
    if recipe.eval.faults is not None:
        watched = _watched(candidate, "memorised faults", description)
        faults = find_memorised(known_faults(recipe), watched, recipe.eval.faults.max_new_tokens)
    return ModelResults(description, results, quality_of(candidate.written), faults)


def known_faults(recipe: Recipe) -> list[KnownFault]:
    """The faulty rows that the recipe lists. Raises `DataError` where the list cannot be used."""
    listed = recipe.eval.faults
    return [] if listed is None else read_faults(listed.data, listed.list)


def _watched(candidate: Candidate, task: str, description: str) -> Candidate:
    """The same candidate (what it writes is kept together), with a progress bar for the task."""
    if not is_first():
        return candidate
    return replace(candidate, watch=partial(progress, f"{task}, {description}"))
