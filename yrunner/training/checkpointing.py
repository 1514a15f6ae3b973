"""Which checkpoints may be trusted: a manifest says what is in each, and is checked before use.

A checkpoint is written beside its place, flushed and renamed (`run_dir.whole_folder`). The manifest
is written last, over whatever files there are then, by one process after all have written.

What a checkpoint holds: all that makes a resumed run equal to one that was never stopped.

A folder that all processes write into: there whole, or not at all.
"""

import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer_callback import ExportableState

from yrunner.console import warn
from yrunner.distributed.collectives import this_rank, wait_for_ranks
from yrunner.errors import RunError
from yrunner.models.errors import quiet_libraries
from yrunner.models.size import SMALL_FILES, saved_weight_bytes, state_bytes
from yrunner.storage.ownership import remove
from yrunner.storage.run_dir import RunDir, partial_folder, read_json, whole_folder, write_json
from yrunner.training.callbacks import Cadence, ValidationCut
from yrunner.training.deepspeed.state import ZeroRun
from yrunner.training.rng_snapshot import Snapshot

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write down the size and the SHA-256 of every file of a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # Threads: hashing large files leaves the interpreter free.
    with ThreadPoolExecutor() as threads:
        entries = threads.map(_describe, files)
        names = [path.relative_to(folder).as_posix() for path in files]
        write_json(folder / MANIFEST, dict(zip(names, entries, strict=True)))


def find_damage(folder: Path, *, read_all: bool = True) -> str | None:
    """What is wrong with a checkpoint, in words; None where it is as it was written.

    Without `read_all` only sizes are compared, which costs nothing however large it is.
    """
    try:
        manifest: dict[str, dict[str, Any]] = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or cannot be read"
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size:,} bytes and should have {entry['size']:,}"
    if not read_all:
        return None
    with ThreadPoolExecutor() as threads:
        found = threads.map(_describe, [folder / name for name in manifest])
        pairs = zip(manifest.items(), found, strict=True)
        changed = next((name for (name, entry), now in pairs if now != entry), None)
    return None if changed is None else f"{changed} is not as it was written (another SHA-256)"


def newest_whole_step(run_dir: RunDir) -> int | None:
    """The update of the newest checkpoint that is whole; None where there is no checkpoint at all.

    Damaged ones after it are named, and put aside as `.step-N.damaged`: they must not count among
    the newest that are kept. Raises `RunError` where all are damaged.
    """
    steps = run_dir.saved_steps()
    for step in reversed(steps):
        folder = run_dir.checkpoint(step)
        damage = find_damage(folder)
        if damage is None:
            return step
        warn(f"the checkpoint {folder} is damaged: {damage}; the one before it is used")
        _put_aside(folder)
    if steps:
        raise RunError(
            f"none of the {len(steps)} checkpoints in {run_dir.checkpoints} is whole",
            remedy="bring one back from a copy, or start anew with --overwrite",
        )
    return None


def remove_old(run_dir: RunDir, *, keep: int, best: int | None) -> None:
    """Remove all checkpoints but the newest `keep` of full size and the one after update `best`.

    The last that is whole is never removed: one of another size does not count as kept.
    """
    steps = run_dir.saved_steps()
    whole = [step for step in steps if not find_damage(run_dir.checkpoint(step), read_all=False)]
    for step in set(steps) - {*whole[-keep:], best}:
        if whole:
            remove(run_dir.checkpoint(step))


def remove_unfinished(run_dir: RunDir) -> None:
    """Remove what a killed process has left half-written beside the checkpoints."""
    for pattern in (".*.partial", ".*.previous", ".rehearsal"):
        for folder in run_dir.checkpoints.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def _put_aside(folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    # Another process of the same run may have done so.
    with suppress(FileNotFoundError):
        folder.rename(aside)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


@contextmanager
def shared_folder(final: Path, needed: int | None = None) -> Iterator[Path]:
    """As `whole_folder`, made and named by rank 0, when every process has written its part.

    On several machines it has to lie on a disk that they share.
    """
    if this_rank() == 0:
        with whole_folder(final, needed) as folder:
            wait_for_ranks()
            yield folder
            wait_for_ranks()
    else:
        wait_for_ranks()
        yield partial_folder(final)
        wait_for_ranks()
    # Named now; the others may look for it.
    wait_for_ranks()


SCHEDULER = "scheduler.pt"
"""Trainer's name of the file that says where the learning rate stands."""


class SavingTrainer(Trainer):
    """transformers' Trainer with whole checkpoints in a run folder, also in the midst of an update.

    A subclass sets these attributes, and `before_update` when an update begins and ends.
    """

    control: TrainerControl
    run_dir: RunDir
    keep_checkpoints: int
    sums: list[Any]
    """What adds up from update to update; see standing.py."""
    zero: ZeroRun | None = None
    """Where DeepSpeed shares memory out; None without it."""
    before_update: Snapshot | None = None
    """What an update that is under way has to be taken back to; None between two updates."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, and first the validation that a stopped run has missed."""
        self.add_callback(MissedValidation(self))
        return super().train(*args, **kwargs)

    def make_up_validation(self) -> None:
        """Validate, and save what it says, where the run was stopped before it could."""
        cadences = [it for it in self.callback_handler.callbacks if isinstance(it, Cadence)]
        if not any(cadence.misses_validation(self.state) for cadence in cadences):
            return
        # The checkpoint is written anew, with the generators that it has.
        self._load_rng_state(str(self.run_dir.checkpoint(self.state.global_step)))
        self.control.should_evaluate = self.control.should_save = True
        self._maybe_log_save_evaluate(self._tr_loss, None, self.model, None, 0.0, None, 0.0)

    def _run_epoch(self, **kwargs: Any) -> None:
        """Trainer's, unless the validation that was made up for has ended the run."""
        if not self.control.should_training_stop:
            super()._run_epoch(**kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's; a validation that a signal cuts off leaves a checkpoint without one."""
        # A data loader draws a number when it begins.
        before = Snapshot([])
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except ValidationCut:
            before.restore()
            self.control.should_evaluate = False
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def abort_update(self) -> None:
        """Forget the update that is under way; weights and optimizer have not moved yet."""
        assert self.before_update is not None, "no update is under way"
        self.before_update.restore()
        self.before_update = None

    def save_before_update(self) -> None:
        """Write a checkpoint of what stood before the update that is under way."""
        self._save_checkpoint(self.model, None)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its final place and rename it: it is there whole or not at all.

        Replaces Trainer's method of the same name, whose files it writes, for another name of the
        folder and for that order. An update that was cut off is taken back.
        """
        if self.before_update is not None:
            self.abort_update()
        if self.state.best_global_step:
            best = self.run_dir.checkpoint(self.state.best_global_step)
            self.state.best_model_checkpoint = str(best)
        for each in self._stateful():
            self.state.stateful_callbacks[type(each).__name__] = each.state()
        place = self.run_dir.checkpoint(self.state.global_step)
        with shared_folder(place, self._checkpoint_bytes()) as folder:
            self.write_state(folder)
            wait_for_ranks()
            if self.args.should_save:
                write_manifest(folder)
        if self.args.should_save:
            keep, best_step = self.keep_checkpoints, self.state.best_global_step
            remove_old(self.run_dir, keep=keep, best=best_step)

    def write_state(self, folder: Path) -> None:
        """Write everything that a resumed run needs."""
        with quiet_libraries():
            self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; under DeepSpeed with the optimizer's own weights, which are not rounded."""
        if self.zero is None:
            super().save_model(output_dir, _internal_call)
        else:
            self._save(output_dir, state_dict=self.zero.whole_weights())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.zero is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.zero.save(Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        if self.zero is None or resume_from_checkpoint is None:
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.zero.load(Path(resume_from_checkpoint))
        scheduler = torch.load(Path(resume_from_checkpoint) / SCHEDULER, weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)
        # The scheduler sets the rate only when it steps; until then it would be that of the start.
        rates = self.lr_scheduler.get_last_lr()
        for group, rate in zip(self.deepspeed.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return prepared

    def _load_best_model(self) -> None:
        if self.zero is None:
            super()._load_best_model()
        else:
            best = Path(self.state.best_model_checkpoint or "")
            self.zero.load(best, with_moments=False)

    def _checkpoint_bytes(self) -> int | None:
        """What a checkpoint will take; None where each process writes a part of it."""
        if self.is_deepspeed_enabled or self.optimizer is None:
            return None
        return saved_weight_bytes(self.model) + state_bytes(self.optimizer) + SMALL_FILES

    def _stateful(self) -> list[ExportableState]:
        every = (*self.callback_handler.callbacks, *self.sums)
        return [each for each in every if isinstance(each, ExportableState)]

    def _load_callback_state(self) -> None:
        """Give callbacks, and what sums up for the next record, their state back.

        Trainer's would change the order of the callbacks, and stop a run because it was stopped.
        """
        for each in self._stateful():
            saved = self.state.stateful_callbacks.get(type(each).__name__, {})
            for name, value in saved.get("attributes", {}).items():
                setattr(each, name, value)

    def _finalize_training(self, *args: Any) -> Any:
        """Trainer's, which loads the best checkpoint: found where this run folder is now."""
        best = self.state.best_global_step
        if best and self.args.load_best_model_at_end:
            folder = self.run_dir.checkpoint(best)
            damage = find_damage(folder)
            self.state.best_model_checkpoint = str(folder) if damage is None else None
            if damage is not None:
                warn(
                    f"the best checkpoint {folder} is damaged: {damage}; "
                    "the model is that of the last update instead"
                )
        return super()._finalize_training(*args)


class MissedValidation(TrainerCallback):
    """Comes after all other callbacks, which have to be ready for its records."""

    def __init__(self, trainer: SavingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Validate before the first update."""
        self.trainer.make_up_validation()
