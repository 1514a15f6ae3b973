"""The result of a recipe's run, for the commands that come after training."""

from typing import Any

import torch

from yrunner.commands.base import base_source
from yrunner.errors import RunError
from yrunner.models.load import choose_dtype, load_model, load_tokenizer
from yrunner.recipe.schema import Recipe
from yrunner.run_dir import RunDir


def finished_run(recipe: Recipe) -> RunDir:
    """The run folder of a recipe. Raises `RunError` where its model is not there yet."""
    run_dir = RunDir(recipe.run_folder)
    if not run_dir.is_finished():
        raise RunError(
            f"{recipe.name} has no result in {run_dir.folder}", remedy="train it first: yrun train"
        )
    return run_dir


def tuned_tokenizer(run_dir: RunDir) -> Any:
    """The tokenizer that was saved with the model, chat template included."""
    return load_tokenizer(str(run_dir.model))


def tuned_model(recipe: Recipe, run_dir: RunDir) -> Any:
    """The trained model; an adapter is merged into its base, in memory."""
    return load_finished(recipe, str(run_dir.model))


def checkpoint_model(recipe: Recipe, run_dir: RunDir, step: int) -> Any:
    """The model as it was after so many updates; an adapter is merged into its base, in memory."""
    return load_finished(recipe, str(run_dir.checkpoint(step)))


def base_model(recipe: Recipe) -> Any:
    """The model as it was before training."""
    return load_finished(recipe, base_source(recipe))


def load_finished(recipe: Recipe, source: str) -> Any:
    """The model at a folder or Hub id, on the device, as the recipe wants it loaded."""
    model = load_model(
        source,
        dtype=choose_dtype(recipe.model.dtype),
        attention=recipe.model.attention,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")
