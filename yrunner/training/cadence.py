"""When a run logs, validates, saves and stops."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from yrunner.data.plan import epoch_after
from yrunner.training.signals import on_stop_signals


def checkpoint_is_due(step: int, every: Literal["epoch"] | int, epoch_ends: Sequence[int]) -> bool:
    """Whether the recipe asks for a checkpoint after this update, wherever the run may end."""
    return step in epoch_ends if every == "epoch" else step % every == 0


class Cadence(TrainerCallback):
    """Takes the place of transformers' DefaultFlowCallback, which knows one epoch only: the plan.

    A run that is asked to stop does so after the micro-step, and goes on as if it had not: what
    was summed up for the next record is saved with the checkpoint, not logged.
    """

    def __init__(
        self,
        *,
        epoch_ends: Sequence[int],
        log_every: int,
        checkpoint_every: Literal["epoch"] | int,
        validates: bool,
    ) -> None:
        self.epoch_ends = epoch_ends
        self.log_every = log_every
        self.checkpoint_every = checkpoint_every
        self.validates = validates
        self.interrupted_by: int | None = None
        self._saved_step: int | None = None

    def on_substep_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Cut an update off where a signal has come, and save what stood before it.

        With several processes it is finished: they would not all stop after the same micro-step.
        """
        if self.interrupted_by is not None and args.world_size == 1:
            control.should_save = state.global_step != self._saved_step
            control.should_training_stop = True
        return control

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Set the switches for what Trainer does after this update."""
        step = state.global_step
        state.epoch = epoch_after(step, self.epoch_ends)
        interrupted = self.interrupted_by is not None
        last = step >= state.max_steps
        due = last or checkpoint_is_due(step, self.checkpoint_every, self.epoch_ends)
        control.should_evaluate = due and self.validates
        control.should_save = due or interrupted
        # The sums of several processes are not saved with a checkpoint: log them now.
        adrift = interrupted and args.world_size > 1
        control.should_log = due or adrift or step % self.log_every == 0
        control.should_training_stop = last or interrupted
        return control

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Stop after a checkpoint during which, or during whose validation, a signal has come."""
        self._saved_step = state.global_step
        control.should_training_stop |= self.interrupted_by is not None
        return control

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """On a signal that asks to stop save and stop; a second SIGINT stops at once."""

        def stop(number: int) -> None:
            if self.interrupted_by is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.interrupted_by = number

        with on_stop_signals(stop):
            yield
