"""`yrun inspect --html`: what the base and the result make of every token, as a page."""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from yrunner.assembly.identity import changes_since
from yrunner.assembly.model import (
    base_model,
    finished_run,
    recipe_tokenizer,
    stale_base,
    tuned_model,
    tuned_tokenizer,
)
from yrunner.assembly.score_rows import score_rows
from yrunner.commands.inspect.command import first_rows, one_row
from yrunner.console import say
from yrunner.data.conversation import TokenizedExample
from yrunner.errors import RunError, YRunnerError
from yrunner.models.load import check_vocabulary
from yrunner.recipe.load import base_recipe_path, load_recipe
from yrunner.recipe.schema.recipe import Recipe
from yrunner.reports.heat_map import AFTER, BEFORE, HeatMap, ScoredExample, write_heat_map
from yrunner.scoring.measure import TokenScores
from yrunner.storage.run_dir import RunDir, page_beside
from yrunner.training.arguments import token_weight


def inspect_html(
    path: Path, overrides: list[str], *, number: int, row: str | None, page: Path | None
) -> None:
    """Write the rows that `inspect` prints as a token heat map, and say where it is.

    `page` is the file; None puts it beside the run folder. Raises `YRunnerError` where it is no
    .html file, and where the base, or the result of a new model, has yet to be trained.
    """
    recipe = load_recipe(path, overrides)
    page = page_beside(recipe.run_folder, "tokens", page)
    result = _find_models(recipe)
    tokenizer = recipe_tokenizer(recipe)
    if result is not None:
        _check_tokenizer(result, tokenizer)
    examples, left_out = _examples(recipe, tokenizer, number, row)
    models = _models(recipe, result)
    scores = {
        when: _score(load, tokenizer, recipe, examples, when) for when, (_, load) in models.items()
    }
    heat_map = HeatMap(
        title=recipe.name,
        models={when: name for when, (name, _) in models.items()},
        weighting=recipe.loss.kind,
        loss_deadline=token_weight(recipe.loss)[1],
        examples=[
            ScoredExample(example, {when: of[place] for when, of in scores.items()}, left_out)
            for place, example in enumerate(examples)
        ],
        other_settings=[] if result is None else _other_settings(result, recipe),
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    write_heat_map(heat_map, tokenizer, page)
    say(f"tokens: {page}")


def _find_models(recipe: Recipe) -> RunDir | None:
    """Where the result is, if there is one. Raises `RunError` where a model has to be trained."""
    if recipe.model.scratch is not None:
        # What random weights make of a token tells nothing.
        return finished_run(recipe)
    stale = stale_base(recipe)
    if stale is not None:
        raise RunError(
            f"{stale[0].name}, the base of {recipe.name}, has no result that fits its recipe",
            remedy=f"train it first: yrun train {base_recipe_path(recipe)}",
        )
    run_dir = RunDir(recipe.run_folder)
    return run_dir if run_dir.is_finished() else None


def _check_tokenizer(result: RunDir, tokenizer: Any) -> None:
    if tuned_tokenizer(result).get_vocab() != tokenizer.get_vocab():
        raise RunError(
            f"the result in {result.folder} has another tokenizer than the recipe has now",
            remedy="train it again: yrun train ... --overwrite",
        )


def _examples(
    recipe: Recipe, tokenizer: Any, number: int, row: str | None
) -> tuple[list[TokenizedExample], str]:
    """The examples that are shown, and why they are not learned from where that is so."""
    if row is None:
        rows = first_rows(recipe, tokenizer, number)
        return [example for examples in rows for example in examples], ""
    found = one_row(recipe, tokenizer, row)
    left_out = found.left_out.reason if found.left_out else ""
    examples = [example for example in found.examples if example.target_positions]
    if not examples:
        raise YRunnerError(
            f"{row} has no token to colour ({left_out})",
            remedy="see the row itself: yrun inspect without --html",
        )
    return examples, left_out


def _models(
    recipe: Recipe, result: RunDir | None
) -> dict[str, tuple[str, Callable[[], PreTrainedModel]]]:
    """What a person calls the base and the result, as far as they are there; how each is loaded."""
    models: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {}
    if recipe.model.scratch is None:
        path = base_recipe_path(recipe)
        name = str(recipe.model.base) if path is None else load_recipe(path).name
        models[BEFORE] = (name, partial(base_model, recipe))
    if result is not None:
        models[AFTER] = (str(recipe.run_folder), partial(tuned_model, recipe, result))
    return models


def _score(
    load: Callable[[], PreTrainedModel],
    tokenizer: Any,
    recipe: Recipe,
    examples: list[TokenizedExample],
    when: str,
) -> list[TokenScores]:
    # A model with a fused head refers to itself: without this, two would be in memory at once.
    gc.collect()
    model = load()
    check_vocabulary(model, tokenizer)
    return score_rows(model, tokenizer, recipe, examples, f"scoring, {when} training")


def _other_settings(result: RunDir, recipe: Recipe) -> list[str]:
    return changes_since(result, recipe) if result.fingerprint.exists() else []
