"""What a run folder records of its run, and what a resumed run or a merge has to agree with."""

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
from yrunner.data.dataset.row_report import as_json
from yrunner.errors import RunError
from yrunner.models.local import local_folder
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
    "train.early_stopping",
    "drift",
)
"""Keys that decide what comes after a checkpoint; the learning rate follows them from there."""


def record_start(run: Run, plan: Plan, num_ranks: int) -> None:
    """Write down what the run is, started by so many processes; or how a stopped one goes on."""
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
    write_json(run_dir.environment, {**describe_environment(), "processes": num_ranks})
    write_json(run_dir.data_report, as_json(prepared.reports, prepared.findings))


def check_run_folder(run: Run) -> None:
    """Refuse what could lose a run, before any time is spent."""
    run_dir = run.folder
    run_dir.check(*run_dir.folders() if run.options.overwrite else [run_dir.checkpoints])
    if run.options.resume:
        check_resume(run)
    elif run_dir.is_used() and not run.options.overwrite:
        run_dir.create()  # raises, with what to do


def base_record(run: Run) -> dict[str, object]:
    """Where the base is, its key, and a hash of each file that makes its tokens."""
    source = run.base_source
    folder = local_folder(source)
    found = [folder / name for name in TOKENIZER_FILES] if folder is not None else []
    hashes = hash_files(file for file in found if file.is_file())
    tokenizer = {Path(name).name: value for name, value in hashes.items()}
    return {"base": source, "key": run.base_key, "tokenizer": tokenizer}


def check_base(run: Run) -> str:
    """The key of the base, which has to be the one that the run started from.

    Raises `RunError` where it is another.
    """
    now = base_record(run)
    if not run.folder.base.exists():
        warn(
            f"{run.folder.folder} has no base.json: whether {now['base']} is its base is not known"
        )
        return str(now["key"])
    then = read_json(run.folder.base)
    if {**then, "base": None} == {**now, "base": None}:
        return str(now["key"])
    part = "weights or config" if then["key"] != now["key"] else "tokenizer"
    raise RunError(
        f"{run.recipe.name} was trained on {then['base']} with the key {then['key']}, but the base "
        f"is now {now['base']} with the key {now['key']}: another {part}",
        remedy="bring that base back, or train anew with yrun train --overwrite",
    )


def check_resume(run: Run) -> None:
    """Raise `RunError` where the folder's run cannot be gone on with as this recipe asks for."""
    run_dir, recipe = run.folder, run.recipe
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


def _record_resume(run: Run, step: int, num_updates: int) -> None:
    """Tell what has changed since the run was stopped, and write down how it goes on.

    Raises `RunError` where the changed recipe would end before its checkpoint at update `step`.
    """
    run_dir, recipe = run.folder, run.recipe
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
