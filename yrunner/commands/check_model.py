"""What can be found wrong with a recipe's model before the run loads it."""

from pathlib import Path
from typing import Any

from yrunner.commands.base import base_source, stale_base
from yrunner.models.isolation import check_isolation
from yrunner.models.load import check_folder, choose_dtype, load_model
from yrunner.models.scratch import build_model
from yrunner.recipe.schema import Recipe

BYTES_WORTH_LOADING = 4 * 10**9
"""Weights up to this size are loaded to try whether the model keeps packed examples apart."""


def check_model(recipe: Recipe, tokenizer: Any) -> str | None:
    """Look for missing weights, and whether packed examples are kept apart.

    Returns what only the run itself can find out. Raises `ModelError` where the run would.
    """
    model = _small_model(recipe, tokenizer)
    if not recipe.data.packing:
        return None
    if model is None:
        return "packing: whether the model keeps examples apart is tried when training starts"
    check_isolation(model)
    return None


def _small_model(recipe: Recipe, tokenizer: Any) -> Any:
    """The recipe's model, without its weights where it is yet to be trained; None if it is large.

    It is built only where packing asks for it.
    """
    packs = recipe.data.packing
    if recipe.model.scratch is not None:
        return build_model(recipe.model.scratch.config, tokenizer, recipe.seed) if packs else None
    stale = stale_base(recipe)
    if stale is not None:
        base = stale[0].model_copy(update={"data": recipe.data})
        return _small_model(base, tokenizer)
    folder = Path(base_source(recipe))
    if not folder.is_dir():
        return None
    check_folder(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if not packs or size > BYTES_WORTH_LOADING:
        return None
    return load_model(
        str(folder),
        dtype=choose_dtype(recipe.model.dtype),
        attention=recipe.model.attention,
        trust_remote_code=recipe.model.trust_remote_code,
    )
