"""What a checkpoint holds: all that makes a resumed run equal to one that was never stopped."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer_callback import ExportableState

from yrunner.console import warn
from yrunner.models.disk import SMALL_FILES, saved_weight_bytes, state_bytes
from yrunner.models.quiet import quiet_libraries
from yrunner.ranks import wait_for_ranks
from yrunner.run_dir import RunDir
from yrunner.training.cadence import Cadence, ValidationCut
from yrunner.training.checkpoints import find_damage, remove_old, write_manifest
from yrunner.training.shared_folder import shared_folder
from yrunner.training.standing import Standing
from yrunner.training.zero import ZeroRun

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
    before_update: Standing | None = None
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
        before = Standing([])
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except ValidationCut:
            before.restore()
            self.control.should_evaluate = False
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def take_back_update(self) -> None:
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
            self.take_back_update()
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
