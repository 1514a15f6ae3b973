"""When a run logs, validates, saves, stops, and returns freed memory.

Signals that stop a run: Ctrl-C, SIGTERM, and SIGUSR1, which SLURM sends before its time limit.
"""

import signal
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

from transformers import TrainerCallback, TrainerState

from yrunner.data.batching.plan import Plan
from yrunner.distributed.collectives import max_over_ranks, num_ranks
from yrunner.errors import Stopped
from yrunner.machine import resident_memory, return_freed_memory
from yrunner.recipe.schema.recipe import EarlyStopping, TrainSection
from yrunner.training.drift import count_stalled, drift_points
from yrunner.training.metrics import Record, best_step

GROWN = 1.05
"""Memory of a training beside that of its largest update alone, from which gaps are returned."""


@dataclass(frozen=True)
class Cadence:
    """What happens after which update."""

    num_updates: int
    epoch_ends: Sequence[int] = ()
    log_at: Container[int] = ()
    """Updates to log, besides those that are saved."""
    checkpoint_every: Literal["epoch"] | int | None = None
    """None: never save. Otherwise the last update is saved too."""
    keep: int = 2
    """Checkpoints to keep besides the best one."""
    validate_every: Literal["epoch"] | int | None = None
    """None: with the checkpoints."""
    early_stopping: EarlyStopping | None = None
    loads_best: bool = True
    """Whether the weights of the best validation are loaded at the end."""

    @classmethod
    def of(cls, train: TrainSection, plan: Plan) -> Self:
        """What the recipe says."""
        log_at, saved = range(0, plan.num_updates + 1, train.log_every), train.checkpoint
        plans = (plan.num_updates, plan.epoch_ends, log_at)
        best = train.result == "best"
        stopping = train.early_stopping
        return cls(*plans, saved.every, saved.keep, train.validate_every, stopping, best)

    def saves_after(self, step: int) -> bool:
        """Whether there is a checkpoint after this update."""
        every = self.checkpoint_every
        if every is None or not step:
            return False
        return step >= self.num_updates or checkpoint_is_due(step, every, self.epoch_ends)

    def validates_after(self, step: int) -> bool:
        """Whether the validation rows are measured after this update."""
        if self.validate_every is None or step >= self.num_updates:
            return self.saves_after(step)
        return checkpoint_is_due(step, self.validate_every, self.epoch_ends)

    def misses_validation(self, state: TrainerState) -> bool:
        """Whether the run was stopped before the validation of its last update."""
        validated = [row["step"] for row in state.log_history if "eval_loss" in row]
        return self.validates_after(state.global_step) and state.global_step not in validated

    def stops_early(self, records: Sequence[Record]) -> bool:
        """Whether as many validations as the patience allows have gained nothing.

        All is read from the log, so that a resumed run stops where one that ran through does.
        """
        stopping = self.early_stopping
        if stopping is None:
            return False
        if stopping.metric == "drift":
            return count_stalled(drift_points(records)) >= stopping.patience
        steps = [row["step"] for row in records if "eval_loss" in row]
        best = best_step(records) or min(steps, default=0)
        return sum(step > best for step in steps) >= stopping.patience


def checkpoint_is_due(step: int, every: Literal["epoch"] | int, epoch_ends: Sequence[int]) -> bool:
    """Whether the recipe asks for a checkpoint after this update, wherever the run may end."""
    return step in epoch_ends if every == "epoch" else step % every == 0


def count_checkpoints(
    num_updates: int, every: Literal["epoch"] | int, epoch_ends: Sequence[int]
) -> int:
    """Number of checkpoints that an uninterrupted run writes, the last one included."""
    is_due = (checkpoint_is_due(step, every, epoch_ends) for step in range(1, num_updates))
    return sum(is_due) + 1


MEANINGS = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    # `sbatch --signal=USR1@120`: two minutes until the job is killed.
    signal.SIGUSR1: signal.SIGTERM,
}
"""How each signal is treated, which decides the exit code: 130 or 143."""


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


class StopRequest:
    """Whether a signal has asked the run to stop, which it does when it has saved."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record signals in the `with` block; a second SIGINT stops at once."""

        def note(number: int) -> None:
            if self.signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = number

        with on_stop_signals(note):
            yield

    @property
    def cuts_off(self) -> bool:
        """Whether to stop within an update or a validation, which one process alone can."""
        return self.signal is not None and num_ranks() == 1

    def is_agreed(self) -> bool:
        """Whether any rank received a signal, so that all stop together. A collective call."""
        self.signal = int(max_over_ranks(self.signal or 0)) or None
        return self.signal is not None


class ReturnFreedMemory(TrainerCallback):
    """Return freed memory to the system before and after a training, and when gaps add up."""

    def __init__(self) -> None:
        self._usual = 0
        """The most bytes after an update that followed a return."""
        self._has_returned = False

    def on_train_begin(self, *_: Any, **_more: Any) -> None:
        """What was loaded and measured leaves most."""
        self._return()

    def on_step_end(self, *_: Any, **_more: Any) -> None:
        """Updates that hold more than one alone would have left gaps."""
        now = resident_memory()
        if self._has_returned:
            self._usual, self._has_returned = max(self._usual, now), False
        elif now > GROWN * self._usual:
            self._return()

    def on_train_end(self, *_: Any, **_more: Any) -> None:
        """The report is drawn in the room of the activations."""
        self._return()

    def _return(self) -> None:
        return_freed_memory()
        self._has_returned = True


@contextmanager
def explaining_how_to_resume(remedy: str) -> Iterator[None]:
    """Raise `Stopped` with this remedy if a signal interrupts the `with` block."""
    numbers: list[int] = []

    def stop(number: int) -> None:
        numbers.append(number)
        # Not a YRunnerError: libraries may catch Exception and continue.
        raise KeyboardInterrupt

    try:
        with on_stop_signals(stop):
            yield
    except KeyboardInterrupt:
        if not numbers:
            raise
        raise Stopped(numbers[0], remedy=remedy) from None
