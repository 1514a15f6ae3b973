"""What can be found wrong with a recipe's model before the run loads it."""

from pathlib import Path
from typing import Any

from yrunner.commands.base import base_source, stale_base
from yrunner.errors import ModelError
from yrunner.models.adapters import find_adapter, read_base
from yrunner.models.isolation import check_isolation
from yrunner.models.load import check_folder, choose_dtype, load_model
from yrunner.models.scratch import build_model
from yrunner.recipe.schema import Recipe

BYTES_WORTH_LOADING = 4 * 10**9
"""Weights up to this size are loaded to try whether the model keeps packed examples apart."""


def check_model(recipe: Recipe, tokenizer: Any) -> str | None:
    """Look whether packed examples are kept apart.

    Returns what only the run itself can find out. Raises `ModelError` where the run would.
    """
    if not recipe.data.packing:
        return None
    model = _small_model(recipe, tokenizer)
    if model is None:
        return "packing: whether the model keeps examples apart is tried when training starts"
    check_isolation(model)
    return None


def missing_weights(recipe: Recipe) -> ModelError | None:
    """Why the run could not load its base. All but that is known from a config and a tokenizer."""
    if recipe.model.scratch is None and stale_base(recipe) is None:
        try:
            check_folder(_whole_base(recipe))
        except ModelError as error:
            return error
    return None


def _whole_base(recipe: Recipe) -> Path:
    """The folder of the base's weights: beneath an adapter, that of its own base.

    A Hub id stays what it is, which is no folder here.
    """
    source = base_source(recipe)
    adapter = find_adapter(source) if Path(source).is_dir() else None
    return Path(source if adapter is None else read_base(adapter))


def _small_model(recipe: Recipe, tokenizer: Any) -> Any:
    """The recipe's model, its weights random where it is yet to be trained; None if it is large."""
    if recipe.model.scratch is not None:
        return build_model(recipe.model.scratch.config, tokenizer, recipe.seed)
    stale = stale_base(recipe)
    if stale is not None:
        return _small_model(stale[0], tokenizer)
    size = sum(file.stat().st_size for file in _whole_base(recipe).glob("*.safetensors"))
    if not 0 < size <= BYTES_WORTH_LOADING:
        return None
    return load_model(
        base_source(recipe),
        dtype=choose_dtype(recipe.model.dtype),
        attention=recipe.model.attention,
        trust_remote_code=recipe.model.trust_remote_code,
    )
