"""When a run logs, validates, saves and stops.

The signals that ask a run to stop: Ctrl-C, SIGTERM, and SLURM's warning before it.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from yrunner.data.batching.plan import epoch_after
from yrunner.distributed.collectives import max_over_ranks
from yrunner.errors import Stopped

MEANINGS = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    # `sbatch --signal=USR1@120`: two minutes until the job is killed.
    signal.SIGUSR1: signal.SIGTERM,
}
"""What each signal is taken for, which also decides the exit code: 130 or 143."""


@contextmanager
def on_stop_signals(stop: Callable[[int], None]) -> Iterator[None]:
    """Call `stop` with the meaning of every signal that asks to stop, within the `with` block."""

    def answer(number: int, _frame: object) -> None:
        stop(MEANINGS[signal.Signals(number)])

    previous = {number: signal.signal(number, answer) for number in MEANINGS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def telling_how_to_go_on(remedy: str) -> Iterator[None]:
    """Raise `Stopped` with this remedy where a signal stops what stands in the `with` block."""
    numbers: list[int] = []

    def stop(number: int) -> None:
        numbers.append(number)
        # No error of ours: libraries may catch those, and go on.
        raise KeyboardInterrupt

    try:
        with on_stop_signals(stop):
            yield
    except KeyboardInterrupt:
        if not numbers:
            raise
        raise Stopped(numbers[0], remedy=remedy) from None


def checkpoint_is_due(step: int, every: Literal["epoch"] | int, epoch_ends: Sequence[int]) -> bool:
    """Whether the recipe asks for a checkpoint after this update, wherever the run may end."""
    return step in epoch_ends if every == "epoch" else step % every == 0


def count_checkpoints(
    num_updates: int, every: Literal["epoch"] | int, epoch_ends: Sequence[int]
) -> int:
    """How many checkpoints a run writes that nothing interrupts; one of them is at its end."""
    is_due = (checkpoint_is_due(step, every, epoch_ends) for step in range(1, num_updates))
    return sum(is_due) + 1


class ValidationCut(Exception):
    """A signal has come during a validation, which the resumed run makes up for."""


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

        The very first is finished, for nothing stands before it, and so it is with several
        processes, which would not all stop after the same micro-step.
        """
        if self.interrupted_by is not None and state.global_step and args.world_size == 1:
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
        self._agree()
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

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Cut a validation off where a signal has come. Raises `ValidationCut`."""
        if self.interrupted_by is not None and args.world_size == 1:
            raise ValidationCut

    def misses_validation(self, state: TrainerState) -> bool:
        """Whether the run was stopped before it had validated after this update."""
        step = state.global_step
        due = checkpoint_is_due(step, self.checkpoint_every, self.epoch_ends)
        if not self.validates or not step or not (due or step >= state.max_steps):
            return False
        known = (record["step"] for record in state.log_history if "eval_loss" in record)
        return step not in known

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Stop after a checkpoint during which a signal has come."""
        self._saved_step = state.global_step
        self._agree()
        control.should_training_stop |= self.interrupted_by is not None
        return control

    def _agree(self) -> None:
        """Stop together: a signal reaches one process sooner than another. All of them call it."""
        self.interrupted_by = int(max_over_ranks(self.interrupted_by or 0)) or None

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """On a signal that asks to stop save and stop; a second SIGINT stops at once."""

        def stop(number: int) -> None:
            if self.interrupted_by is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.interrupted_by = number

        with on_stop_signals(stop):
            yield
