"""Which signals ask a run to stop, and what it then says."""

import signal

import pytest

from yrunner.errors import Stopped
from yrunner.training.callbacks import explaining_how_to_resume, on_stop_signals


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM),
        # SLURM's warning, two minutes before SIGTERM: the job ends as if that had come.
        (signal.SIGUSR1, signal.SIGTERM),
    ],
)
def test_a_signal_that_asks_to_stop_is_told_by_its_meaning(sent, meant):
    before = signal.getsignal(sent)
    told = []
    with on_stop_signals(told.append):
        signal.raise_signal(sent)
    assert told == [meant]
    assert signal.getsignal(sent) is before
    with (
        pytest.raises(Stopped, match=r"stopped\. Go on with: yrun train a\.yaml") as caught,
        explaining_how_to_resume("go on with: yrun train a.yaml --resume"),
    ):
        signal.raise_signal(sent)
        pytest.fail("it goes on")
    assert caught.value.exit_code == 128 + meant


def test_a_ctrl_c_that_was_not_ours_stays_one():
    with pytest.raises(KeyboardInterrupt), explaining_how_to_resume("never told"):
        raise KeyboardInterrupt
