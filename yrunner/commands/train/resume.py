"""What `--resume` may go on with: the same run, but for keys that only decide what comes later."""

from collections.abc import Iterator, Mapping
from typing import Any

from yrunner.assembly.identity import WITHOUT_EFFECT, changes_since, fingerprint, package_versions
from yrunner.console import say, warn
from yrunner.errors import RunError
from yrunner.recipe.load import recipe_to_yaml
from yrunner.recipe.schema.recipe import Recipe
from yrunner.storage.run_dir import RunDir, differences, read_json, write_json, write_text
from yrunner.training.checkpointing import newest_whole_step, remove_unfinished

LATER_KEYS = (
    "train.epochs",
    "train.max_steps",
    "train.checkpoint.every",
    "train.early_stopping",
    "drift",
)
"""Keys that decide what comes after a checkpoint; the learning rate follows them from there."""


def check_resume(run_dir: RunDir, recipe: Recipe) -> None:
    """Raise `RunError` where the folder's run cannot be gone on with as this recipe asks for."""
    if not run_dir.fingerprint.exists():
        again = "replace it by --overwrite" if run_dir.is_used() else "start it without --resume"
        raise RunError(f"{run_dir.folder} holds no run to resume", remedy=again)
    changes = changes_since(run_dir, recipe)
    fixed = [key for key in changes if not _may_change(key)]
    if fixed:
        raise RunError(
            f"{run_dir.folder} was trained with other settings: {', '.join(fixed)}",
            remedy=f"set them back to resume it (only these may change: {', '.join(_free_keys())}),"
            " start anew with --overwrite, or learn on from its weights in a run of another name "
            "whose model.base is this recipe",
        )
    if changes and run_dir.is_finished():
        raise RunError(
            f"{recipe.name} is finished, and {', '.join(map(_short, changes))} has changed since",
            remedy="learn on from its weights in a run of another name whose model.base is this "
            "recipe, or start anew with --overwrite",
        )


def find_start(run_dir: RunDir) -> int | None:
    """The update whose checkpoint the run goes on from; None where it has to begin anew.

    What a killed process has left half-written is removed. Raises `RunError` where every
    checkpoint is damaged.
    """
    remove_unfinished(run_dir)
    step = newest_whole_step(run_dir)
    if step is None:
        say(f"{run_dir.folder} has no checkpoint yet: the run begins anew")
    return step


def take_up(run_dir: RunDir, recipe: Recipe, step: int, num_updates: int) -> None:
    """Tell what has changed since the run was stopped, and write down how it goes on.

    Raises `RunError` where the changed recipe would end before its checkpoint at update `step`.
    """
    if step > num_updates:
        raise RunError(
            f"update {step:,} is saved, and the recipe now ends after {num_updates:,}",
            remedy="set train.epochs or train.max_steps to more",
        )
    changes = changes_since(run_dir, recipe)
    if changes:
        say(f"it goes on with other settings: {', '.join(map(_short, changes))}")
        write_text(run_dir.recipe, recipe_to_yaml(recipe))
        write_json(run_dir.fingerprint, fingerprint(recipe))
    changed = differences(read_json(run_dir.environment)["versions"], package_versions())
    if changed:
        warn(
            f"other versions than when it began: {', '.join(changed)}; "
            "the result may differ in its last bits"
        )
    say(f"going on after update {step:,}")


def _may_change(key: str) -> bool:
    return any(f"{_short(key)}.".startswith(f"{later}.") for later in LATER_KEYS)


def _short(key: str) -> str:
    return key.removeprefix("recipe.")


def _free_keys() -> Iterator[str]:
    """The keys that may change at a resume, by their dotted names."""
    yield from LATER_KEYS
    yield from _dotted(WITHOUT_EFFECT)


def _dotted(keys: Mapping[str, Any] | set[str]) -> Iterator[str]:
    for key in sorted(keys):
        below: Any = keys[key] if isinstance(keys, Mapping) else True
        if below is True:
            yield key
        else:
            yield from (f"{key}.{inner}" for inner in _dotted(below))
