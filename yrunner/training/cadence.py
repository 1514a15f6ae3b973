"""When a run logs, validates, saves and stops."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from yrunner.data.plan import epoch_after
from yrunner.ranks import highest_of_ranks


def checkpoint_is_due(step: int, every: Literal["epoch"] | int, epoch_ends: Sequence[int]) -> bool:
    """Whether the recipe asks for a checkpoint after this update, wherever the run may end."""
    return step in epoch_ends if every == "epoch" else step % every == 0


class Cadence(TrainerCallback):
    """Takes the place of transformers' DefaultFlowCallback, which knows one epoch only: the plan.

    A checkpoint is always preceded by a log, so that no sums are pending when a run is resumed.
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

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Set the switches for what Trainer does after this update."""
        step = state.global_step
        # A signal reaches one process sooner than another; all have to stop after the same update.
        self.interrupted_by = int(highest_of_ranks(self.interrupted_by or 0)) or None
        state.epoch = epoch_after(step, self.epoch_ends)
        last = step >= state.max_steps
        due = last or checkpoint_is_due(step, self.checkpoint_every, self.epoch_ends)
        control.should_evaluate = due and self.validates
        control.should_save = due or self.interrupted_by is not None
        control.should_log = step % self.log_every == 0 or control.should_save
        control.should_training_stop = last or self.interrupted_by is not None
        return control

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """On SIGINT or SIGTERM finish the update, save and stop; a second SIGINT stops at once."""

        def stop(number: int, _frame: object) -> None:
            if self.interrupted_by is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.interrupted_by = number

        previous = {
            number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
