"""What a checkpoint holds: all that makes a resumed run equal to one that was never stopped."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from yrunner.console import warn
from yrunner.models.disk import SMALL_FILES, saved_weight_bytes, state_bytes
from yrunner.models.quiet import quiet_libraries
from yrunner.run_dir import RunDir, whole_folder
from yrunner.training.checkpoints import find_damage, remove_old, write_manifest
from yrunner.training.standing import Standing


class SavingTrainer(Trainer):
    """transformers' Trainer with whole checkpoints in a run folder, also in the midst of an update.

    A subclass sets these attributes, and `before_update` when an update begins and ends.
    """

    run_dir: RunDir
    keep_checkpoints: int
    sums: list[Any]
    """What adds up from update to update; see standing.py."""
    before_update: Standing | None = None
    """What an update that is under way has to be taken back to; None between two updates."""

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
        with whole_folder(place, self._checkpoint_bytes()) as folder:
            self.write_state(folder)
            write_manifest(folder)
        keep, best_step = self.keep_checkpoints, self.state.best_global_step
        remove_old(self.run_dir, keep=keep, best=best_step)

    def write_state(self, folder: Path) -> None:
        """Write everything that a resumed run needs."""
        with quiet_libraries():
            self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / "trainer_state.json"))

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
