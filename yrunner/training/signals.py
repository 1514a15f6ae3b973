"""The signals that ask a run to stop: Ctrl-C, SIGTERM, and SLURM's warning before it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
