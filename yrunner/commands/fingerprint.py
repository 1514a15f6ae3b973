"""What the result of a run depends on: its recipe, its data and its base."""

from pathlib import Path
from typing import Any

from yrunner.commands.data_files import recipe_sources
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
    its files are taken, which is cheap for weights of any size. Folders that lie above a file are
    left out.
    """
    files = [file for source in recipe_sources(recipe) for file in source.files]
    extra = [recipe.model.chat_template] if recipe.model.chat_template else []
    return {
        "recipe": _without_folders(recipe.model_dump(mode="json", exclude=WITHOUT_EFFECT)),
        "files": _by_name(hash_files([*files, *extra])),
        "base": _base_fingerprint(recipe),
    }


def changes_since(run_dir: RunDir, recipe: Recipe) -> list[str]:
    """What differs between a run and a recipe, as dotted keys; empty when nothing does."""
    return differences(read_json(run_dir.fingerprint), fingerprint(recipe))


def _by_name(hashes: dict[str, str]) -> dict[str, str]:
    """Hashes by the names of the files; those of one name are told apart by a number."""
    named: dict[str, str] = {}
    for path, value in hashes.items():
        name = Path(path).name
        twins = sum(Path(other).name == name for other in hashes if other < path)
        named[f"{name} ({twins + 1})" if twins else name] = value
    return named


def _without_folders(value: Any) -> Any:
    """The same with file names for absolute paths: a project may be moved between two commands."""
    match value:
        case str():
            return Path(value).name if value.startswith("/") else value
        case list():
            return [_without_folders(part) for part in value]
        case dict():
            return {_without_folders(key): _without_folders(part) for key, part in value.items()}
    return value


def _base_fingerprint(recipe: Recipe) -> Any:
    path = base_recipe_path(recipe)
    if path is not None:
        return fingerprint(load_recipe(path))
    folder = Path(recipe.model.base or "")
    if recipe.model.base is None or not folder.is_dir():
        return None
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
