"""What the result of a run depends on: fingerprint of recipe, data and base; environment."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from yrunner.assembly.dataset import find_sources, keep_sources
from yrunner.console import counted
from yrunner.models.local import GGUF
from yrunner.recipe.load import (
    base_recipe_path,
    judge_recipe_paths,
    load_recipe,
    teacher_recipe_path,
)
from yrunner.recipe.schema.recipe import Recipe
from yrunner.storage.run_dir import RunDir, SortDir, differences, hash_files, read_json

PACKAGES = ("yrunner", "torch", "transformers", "peft", "accelerate", "tokenizers")
WITHOUT_EFFECT: dict[str, Any] = {
    "output": True,
    "eval": True,
    "sort": True,
    "merge": True,
    "compare": True,
    "distributed": True,
    "rollout": {"batch_size", "gpu_share"},
    "train": {"checkpoint": {"keep"}, "log_every": True, "spikes": True, "trackers": True},
}
"""Recipe keys that do not affect the trained model."""


def describe_environment() -> dict[str, Any]:
    """Content of environment.json: versions, commit, device, command. It has no secrets."""
    return {
        "versions": package_versions(),
        "commit": _commit(),
        "device": describe_device(),
        "platform": platform.platform(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def describe_device() -> str:
    """The GPU's name, or the number of CPU threads."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}"


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of this source checkout; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


def fingerprint(recipe: Recipe) -> dict[str, Any]:
    """The recipe's keys that affect the result, and a hash of every training file.

    A base, teacher or reward model that is a recipe counts by its fingerprint, a folder by the
    names and sizes of its files, which is cheap for weights of any size. The folders above a file
    do not count.
    """
    files = [file for source in find_sources(recipe.data) for file in source.files]
    template = recipe.model.template_file
    extra = [] if template is None else [template]
    extra += [file for source in keep_sources(recipe) for file in source.files]
    found = {
        "recipe": _keys_that_matter(recipe),
        "files": _by_name(hash_files([*files, *extra])),
        "base": _model_fingerprint(recipe.model.base, base_recipe_path(recipe)),
    }
    if recipe.teacher is not None:
        path = teacher_recipe_path(recipe)
        found["teacher"] = _model_fingerprint(recipe.teacher.model, path)
    if judges := judge_recipe_paths(recipe):
        found["judges"] = {path.name: fingerprint(load_recipe(path)) for path in judges}
    return found


def sort_fingerprint(recipe: Recipe) -> dict[str, Any]:
    """What the result of `yrun sort` depends on: as `fingerprint`, with the rules of the sort."""
    marks = recipe.sort.marks
    return {
        **fingerprint(recipe),
        "sort": without_folders(recipe.sort.model_dump(mode="json")),
        "marks": None if marks is None else _by_name(hash_files([marks])),
    }


def sort_changes(folder: SortDir, recipe: Recipe) -> list[str]:
    """The dotted keys that differ between a finished sort and a recipe."""
    then = _with_new_keys(read_json(folder.fingerprint), recipe)
    now = sort_fingerprint(recipe)
    is_set = without_folders(recipe.sort.model_dump(mode="json", exclude_defaults=True))
    then["sort"] = _filled(then["sort"], now["sort"], is_set)
    return differences(then, now)


def changes_since(run_dir: RunDir, recipe: Recipe) -> list[str]:
    """The dotted keys that differ between a run and a recipe.

    A key that is newer than the run does not differ as long as it has its default.
    """
    then = _with_new_keys(read_json(run_dir.fingerprint), recipe)
    return differences(then, fingerprint(recipe))


def without_folders(value: Any) -> Any:
    """Replace absolute paths by file names, so that a project can be moved between commands."""
    match value:
        case str():
            return Path(value).name if value.startswith("/") else value
        case list():
            return [without_folders(part) for part in value]
        case dict():
            return {without_folders(key): without_folders(part) for key, part in value.items()}
    return value


def _keys_that_matter(recipe: Recipe, *, only_set: bool = False) -> Any:
    """The recipe's values; `only_set`: without defaults."""
    exclude = _without_effect(recipe)
    return without_folders(
        recipe.model_dump(mode="json", exclude=exclude, exclude_defaults=only_set)
    )


def _without_effect(recipe: Recipe) -> dict[str, Any]:
    """Drift is only measured, unless it can stop the run early."""
    stopping = recipe.train.early_stopping
    can_stop = stopping is not None and stopping.metric == "drift"
    return WITHOUT_EFFECT if can_stop else WITHOUT_EFFECT | {"drift": True}


def _with_new_keys(then: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    now, is_set = (_keys_that_matter(recipe, only_set=only_set) for only_set in (False, True))
    filled = {**then, "recipe": _filled(then["recipe"], now, is_set)}
    paths = {"base": base_recipe_path(recipe), "teacher": teacher_recipe_path(recipe)}
    for name, path in paths.items():
        if path is not None and isinstance(then.get(name), dict) and "recipe" in then[name]:
            filled[name] = _with_new_keys(then[name], load_recipe(path))
    judges = {path.name: load_recipe(path) for path in judge_recipe_paths(recipe)}
    if "judges" in then:
        filled["judges"] = {
            name: _with_new_keys(known, judges[name]) if name in judges else known
            for name, known in then["judges"].items()
        }
    return filled


def _filled(then: Any, now: Any, is_set: Any) -> Any:
    """`then`, plus the keys of `now` that it lacks and that have their default."""
    match then, now:
        case dict(), dict():
            is_set = is_set if isinstance(is_set, dict) else {}
            added = {key: now[key] for key in now if key not in then and key not in is_set}
            known = {key: _filled(old, now.get(key), is_set.get(key)) for key, old in then.items()}
            return added | known
        case list(), list() if len(then) == len(now):
            is_set = is_set if isinstance(is_set, list) else [None] * len(now)
            return [_filled(*parts) for parts in zip(then, now, is_set, strict=True)]
    return then


def _by_name(hashes: dict[str, str]) -> dict[str, str]:
    """Hashes by file name; equal names get a number."""
    named: dict[str, str] = {}
    for path, value in hashes.items():
        name = Path(path).name
        twins = sum(Path(other).name == name for other in hashes if other < path)
        named[f"{name} ({twins + 1})" if twins else name] = value
    return named


def _model_fingerprint(source: str | None, recipe_path: Path | None) -> Any:
    if recipe_path is not None:
        return fingerprint(load_recipe(recipe_path))
    folder = Path(source or "")
    if folder.suffix == GGUF and folder.is_file():
        return {folder.name: folder.stat().st_size}
    if source is None or not folder.is_dir():
        return None
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
