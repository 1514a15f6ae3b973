"""What the result of a run depends on: its recipe, its data and its base."""

from pathlib import Path
from typing import Any

from yrunner.recipe.load import base_recipe_path, load_recipe
from yrunner.recipe.schema import Recipe
from yrunner.run_dir import RunDir, differences, hash_files, read_json

WITHOUT_EFFECT: dict[str, Any] = {
    "output": True,
    "eval": True,
    "train": {"checkpoint": {"keep"}, "log_every": True, "trackers": True},
}
"""Keys of a recipe that may change without changing the trained model."""


def fingerprint(recipe: Recipe) -> dict[str, Any]:
    """The recipe's keys that matter, and a hash of every file that is learned from.

    A base that is a recipe is named by its own fingerprint; of a folder, the names and sizes of
    its files are taken, which is cheap for weights of any size.
    """
    sources = [*recipe.data.train, *recipe.data.validation]
    extra = [recipe.model.chat_template] if recipe.model.chat_template else []
    return {
        "recipe": recipe.model_dump(mode="json", exclude=WITHOUT_EFFECT),
        "files": hash_files([*(source.file for source in sources), *extra]),
        "base": _base_fingerprint(recipe),
    }


def changes_since(run_dir: RunDir, recipe: Recipe) -> list[str]:
    """What differs between a run and a recipe, as dotted keys; empty when nothing does."""
    return differences(read_json(run_dir.fingerprint), fingerprint(recipe))


def _base_fingerprint(recipe: Recipe) -> Any:
    path = base_recipe_path(recipe)
    if path is not None:
        return fingerprint(load_recipe(path))
    folder = Path(recipe.model.base or "")
    if recipe.model.base is None or not folder.is_dir():
        return None
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
