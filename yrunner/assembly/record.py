"""The record of a run in its folder, and the checks of a resumed run or a merge against it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from yrunner.assembly.identity import (
    WITHOUT_EFFECT,
    changes_since,
    describe_environment,
    fingerprint,
    package_versions,
)
from yrunner.assembly.run import Run
from yrunner.console import say, warn
from yrunner.data.batching.plan import Plan
from yrunner.errors import RunError
from yrunner.models.local import local_folder, read_origin
from yrunner.recipe.load import recipe_to_yaml
from yrunner.storage.run_dir import (
    RunDir,
    differences,
    hash_files,
    read_json,
    write_json,
    write_text,
)
from yrunner.training.checkpointing import newest_whole_step, remove_unfinished

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")

LATER_KEYS = (
    "train.epochs",
    "train.max_steps",
    "train.checkpoint.every",
    "train.validate_every",
    "train.early_stopping",
    "train.result",
    "drift",
)
"""Keys that may change at a resume; the learning rate follows them from the checkpoint on."""


def record_start(run: Run, plan: Plan, num_ranks: int) -> None:
    """Record a new run started by `num_ranks` processes, or the changes of a resumed one."""
    if run.options.from_step is not None:
        if run.recipe.model.base is not None:
            check_base(run)
        _record_resume(run, run.options.from_step, plan.num_updates)
        return
    run_dir, prepared = run.folder, run.dataset
    if run.options.overwrite:
        run_dir.clear()
    run_dir.create()
    write_text(run_dir.recipe, recipe_to_yaml(run.recipe))
    write_json(run_dir.fingerprint, fingerprint(run.recipe))
    if run.recipe.model.base is not None:
        write_json(run_dir.base, base_record(run))
    precision = {"dtype": run.precision.name, "dtype_because": run.precision.why}
    write_json(run_dir.environment, {**describe_environment(), "processes": num_ranks, **precision})
    write_json(run_dir.data_report, prepared.as_json())


def check_run_folder(run: Run) -> None:
    """Refuse to overwrite or resume a run wrongly, before any time is spent."""
    run_dir = run.folder
    run_dir.check(*run_dir.folders() if run.options.overwrite else [run_dir.checkpoints])
    if run.options.resume:
        check_resume(run)
    elif run_dir.is_used() and not run.options.overwrite:
        run_dir.create()  # raises, with the remedy


def base_record(run: Run) -> dict[str, object]:
    """The base, its key, a hash of each of its tokenizer files, and the GGUF file it came from."""
    source = run.base_source
    folder = local_folder(source)
    found = [folder / name for name in TOKENIZER_FILES] if folder is not None else []
    hashes = hash_files(file for file in found if file.is_file())
    tokenizer = {Path(name).name: value for name, value in hashes.items()}
    record: dict[str, object] = {"base": source, "key": run.base_key, "tokenizer": tokenizer}
    unpacked = read_origin(folder) if folder is not None else None
    return record if unpacked is None else record | {"unpacked_from": unpacked}


def check_base(run: Run) -> str:
    """The key of the base. Raises `RunError` if the run started from another base."""
    now = base_record(run)
    if not run.folder.base.exists():
        warn(
            f"{run.folder.folder} has no base.json: cannot check whether {now['base']} is its base"
        )
        return str(now["key"])
    then = read_json(run.folder.base)
    if {**then, "base": None} == {**now, "base": None}:
        return str(now["key"])
    part = "weights or config differ" if then["key"] != now["key"] else "tokenizer differs"
    raise RunError(
        f"{run.recipe.name} was trained on {then['base']} with the key {then['key']}, but the base "
        f"is now {now['base']} with the key {now['key']}: its {part}",
        remedy="restore that base, or train again with yrun train --overwrite",
    )


def check_resume(run: Run) -> None:
    """Raise `RunError` if this recipe cannot resume the run in its folder."""
    run_dir, recipe = run.folder, run.recipe
    if not run_dir.fingerprint.exists():
        remedy = "replace it with --overwrite" if run_dir.is_used() else "start without --resume"
        raise RunError(f"{run_dir.folder} has no run to resume", remedy=remedy)
    changes = changes_since(run_dir, recipe)
    fixed = [key for key in changes if not _may_change(key)]
    if fixed:
        raise RunError(
            f"{run_dir.folder} was trained with other settings: {', '.join(fixed)}",
            remedy=f"set them back to resume it (only these may change: {', '.join(_free_keys())}),"
            " start over with --overwrite, or continue from its weights in a run with another name "
            "whose model.base is this recipe",
        )
    if changes and run_dir.is_finished():
        raise RunError(
            f"{recipe.name} is finished, and {', '.join(map(_short, changes))} has changed since",
            remedy="continue from its weights in a run with another name whose model.base is this "
            "recipe, or start over with --overwrite",
        )


def find_start(run_dir: RunDir) -> int | None:
    """The update to resume from; None if there is no checkpoint.

    Removes half-written files of a killed process. Raises `RunError` if every checkpoint is
    damaged.
    """
    remove_unfinished(run_dir)
    step = newest_whole_step(run_dir)
    if step is None:
        say(f"{run_dir.folder} has no checkpoint yet: starting from the beginning")
    return step


def _record_resume(run: Run, step: int, num_updates: int) -> None:
    """Print and record what has changed since the run was stopped.

    Raises `RunError` if the changed recipe would end before its checkpoint at update `step`.
    """
    run_dir, recipe = run.folder, run.recipe
    if step > num_updates:
        raise RunError(
            f"update {step:,} is saved, but the recipe now ends after {num_updates:,}",
            remedy="raise train.epochs or train.max_steps",
        )
    changes = changes_since(run_dir, recipe)
    if changes:
        say(f"resuming with other settings: {', '.join(map(_short, changes))}")
        write_text(run_dir.recipe, recipe_to_yaml(recipe))
        write_json(run_dir.fingerprint, fingerprint(recipe))
    changed = differences(read_json(run_dir.environment)["versions"], package_versions())
    if changed:
        warn(
            f"versions changed since the start: {', '.join(changed)}; "
            "the result may differ in its last bits"
        )
    say(f"resuming after update {step:,}")


def _may_change(key: str) -> bool:
    return any(f"{_short(key)}.".startswith(f"{later}.") for later in LATER_KEYS)


def _short(key: str) -> str:
    return key.removeprefix("recipe.")


def _free_keys() -> Iterator[str]:
    """The dotted keys that may change at a resume."""
    yield from LATER_KEYS
    yield from _dotted(WITHOUT_EFFECT)


def _dotted(keys: Mapping[str, Any] | set[str]) -> Iterator[str]:
    for key in sorted(keys):
        below: Any = keys[key] if isinstance(keys, Mapping) else True
        if below is True:
            yield key
        else:
            yield from (f"{key}.{inner}" for inner in _dotted(below))
