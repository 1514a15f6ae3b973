"""`yrun eval`: the base, the result and any other model in the tasks of a recipe, side by side."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from yrunner.assembly.measure import evaluate
from yrunner.assembly.run import Run
from yrunner.commands.eval.report import as_json, print_results, write_page
from yrunner.console import say
from yrunner.errors import RunError, YRunnerError
from yrunner.evaluation.figure_lines import BASE, TUNED
from yrunner.evaluation.parallel import joined
from yrunner.evaluation.results import ModelResults
from yrunner.models.load import check_vocabulary
from yrunner.recipe.schema.section import is_recipe_path
from yrunner.storage.run_dir import RunDir, write_json


def eval_recipe(path: Path, overrides: list[str], models: Sequence[str]) -> None:
    """Examine every model, print the figures, and write `eval.json` and `eval.html`.

    `models` are folders, Hub ids or recipes beside the recipe's own base and result. Whatever can
    be wrong with the tasks is found before a model is loaded.
    """
    run = Run.load(path, overrides)
    recipe, run_dir = run.recipe, run.folder
    run_dir.check()
    if not recipe.eval.tasks and recipe.eval.faults is None:
        raise YRunnerError(f"{path} has no eval.tasks", remedy="add one, with name, side and data")
    tasks = run.tasks if recipe.eval.tasks else []
    faults = run.known_faults
    with joined() as is_writer:
        contestants = _contestants(run, models)
        results = [_examine(run, contestant) for contestant in contestants]
    if not is_writer:
        return
    run_dir.folder.mkdir(parents=True, exist_ok=True)
    write_json(run_dir.eval, as_json(recipe, tasks, results))
    write_page(recipe, tasks, faults, results, run_dir.eval_page)
    print_results(tasks, results)
    say(f"figures: {run_dir.eval}")
    say(f"answers: {run_dir.eval_page}")


@dataclass(frozen=True)
class _Contestant:
    """A model that is still on the disk; its tokenizer is known to be good."""

    name: str
    source: str
    tokenizer: Any


def _contestants(run: Run, models: Sequence[str]) -> list[_Contestant]:
    """The base and the result, and the models that were asked for.

    A recipe without a result may still evaluate its base and other models.
    """
    if not models:
        run.require_result()
    run_dir, found = run.folder, []
    if run.recipe.model.base is not None:
        if run.base is not None:
            run.base.require_result()
        # The result's tokenizer brings the chat template that both were asked with in training.
        source = run.base_source
        tokenizer = run.result_tokenizer if run_dir.is_finished() else run.load_tokenizer(source)
        found.append(_Contestant(BASE, source, tokenizer))
    if run_dir.is_finished():
        found.append(_Contestant(TUNED, str(run_dir.model), run.result_tokenizer))
    for model in models:
        name, source = _named_source(model)
        name = _unused(name, [other.name for other in found])
        found.append(_Contestant(name, source, run.load_tokenizer(source)))
    return found


def _unused(name: str, used: Sequence[str]) -> str:
    """The name, or where another model has it, the name with a number."""
    numbered = (f"{name} ({number})" for number in count(2))
    return next(free for free in chain([name], numbered) if free not in used)


def _named_source(model: str) -> tuple[str, str]:
    """What a person calls a model, and where it is: a recipe and a run folder stand for theirs."""
    if is_recipe_path(model):
        run = Run.load(Path(model))
        run.require_result()
        return run.recipe.name, str(run.folder.model)
    folder = Path(model)
    if RunDir(folder).is_finished():
        return folder.name, str(RunDir(folder).model)
    if not folder.exists() and model.startswith((".", "/", "~")):
        raise RunError(f"there is no model {model}", remedy="name a folder, a Hub id or a recipe")
    return folder.name, model


def _examine(run: Run, contestant: _Contestant) -> ModelResults:
    model = run.load_model(contestant.source)
    check_vocabulary(model, contestant.tokenizer)
    results = evaluate(run, model, contestant.tokenizer, contestant.name)
    # Before the next is loaded: two models need not fit into memory at once.
    del model
    gc.collect()
    return results
