"""`yrun eval`: compare base, result and other models on the tasks of a recipe."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from yrunner.assembly.measure import base_of, evaluate, kept_results
from yrunner.assembly.report import result_in_words
from yrunner.assembly.run import Run
from yrunner.commands.eval.report import as_json, print_results, write_page
from yrunner.console import say
from yrunner.errors import RunError, YRunnerError
from yrunner.evaluation.evaluated_model import Deferred
from yrunner.evaluation.figure_lines import BASE, TUNED
from yrunner.evaluation.parallel import joined
from yrunner.evaluation.results import ModelResults
from yrunner.models.load import check_vocabulary
from yrunner.models.meta import read_config
from yrunner.recipe.schema.section import is_recipe_path
from yrunner.storage.run_dir import RunDir, write_json


def eval_recipe(path: Path, overrides: list[str], models: Sequence[str]) -> None:
    """Evaluate every model, print the figures, and write `eval.json` and `eval.html`.

    `models`: folders, Hub ids or recipes besides the recipe's base and result. Faulty tasks are
    refused before a model is loaded.
    """
    run = Run.load(path, overrides)
    recipe, run_dir = run.recipe, run.folder
    run_dir.check()
    tasks, faults = run.eval_tasks, run.known_faults
    if not tasks and recipe.eval.faults is None:
        raise YRunnerError(
            f"{path} has no eval.tasks, and its rows ask no questions",
            remedy="add a task, with name, side and data",
        )
    if not recipe.eval.tasks and tasks:
        say(
            f"{path} has no eval.tasks: base and result answer {tasks[0][0].name}. Add tasks with "
            "side: general to see what was forgotten"
        )
    which = result_in_words(run_dir) if run_dir.is_finished() else ""
    if which:
        say(f"result: {which}")
    elif models and not run_dir.is_finished():
        say(f"{recipe.name} has no result yet: it is left out")
    with joined() as is_writer:
        entrants = _entrants(run, models)
        base = entrants[0] if recipe.model.base is not None else None
        results = [_evaluate(run, entrant, base) for entrant in entrants]
    if not is_writer:
        return
    run_dir.folder.mkdir(parents=True, exist_ok=True)
    write_json(run_dir.eval, as_json(recipe, tasks, results) | {"computed_in": run.looks_in})
    write_page(recipe, tasks, faults, results, run_dir.eval_page)
    print_results(tasks, results)
    if run.halves_products:
        say(f"computed in {run.looks_in} (model.dtype: auto)")
    say(f"figures: {run_dir.eval}")
    say(f"answers: {run_dir.eval_page}")


@dataclass(frozen=True)
class _Entrant:
    """A model that is not loaded yet, and its tokenizer."""

    name: str
    source: str
    tokenizer: Any


def _entrants(run: Run, models: Sequence[str]) -> list[_Entrant]:
    """Base, result and the given models. With given models, the result may be missing."""
    if not models:
        run.require_result()
    run_dir, found = run.folder, []
    if run.recipe.model.base is not None:
        if run.base is not None:
            run.base.require_result()
        # The result's tokenizer has the chat template of the training, which the base uses too.
        source = run.base_source
        tokenizer = run.result_tokenizer if run_dir.is_finished() else run.load_tokenizer(source)
        found.append(_Entrant(BASE, source, tokenizer))
    if run_dir.is_finished():
        found.append(_Entrant(TUNED, str(run_dir.model), run.result_tokenizer))
    for model in models:
        name, source = _named_source(model)
        source = run.in_hugging_face_format(source)
        read_config(source, trust_remote_code=run.recipe.model.trust_remote_code)
        name = _unused(name, [other.name for other in found])
        found.append(_Entrant(name, source, run.load_tokenizer(source)))
    return found


def _unused(name: str, used: Sequence[str]) -> str:
    """The name, numbered if another model has it."""
    numbered = (f"{name} ({number})" for number in count(2))
    return next(free for free in chain([name], numbered) if free not in used)


def _named_source(model: str) -> tuple[str, str]:
    """The name and source of a model; a recipe or a run folder means its result."""
    if is_recipe_path(model):
        run = Run.load(Path(model))
        run.require_result()
        return run.recipe.name, str(run.folder.model)
    folder = Path(model)
    if RunDir(folder).is_finished():
        return folder.name, str(RunDir(folder).model)
    if not folder.exists() and model.startswith((".", "/", "~")):
        raise RunError(f"no model at {model}", remedy="name a folder, a Hub id or a recipe")
    return folder.name, model


def _evaluate(run: Run, entrant: _Entrant, base: _Entrant | None) -> ModelResults:
    """Load a model if anything is left to measure, and free it before the next one is loaded."""

    def load() -> Any:
        model = run.load_model(entrant.source)
        check_vocabulary(model, entrant.tokenizer)
        return model

    results = evaluate(
        run,
        Deferred(load),
        entrant.tokenizer,
        entrant.name,
        kept=kept_results(run) if entrant is base else None,
        base=None if entrant is base or base is None else base_of(run, base.tokenizer),
    )
    gc.collect()
    return results
