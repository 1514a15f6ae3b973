"""How each command begins: a faulty recipe is answered before anything heavy is imported.

How a command ends: the only place that catches errors, and turns them into an exit code.

What libraries say where nothing is wrong, and nobody has to hear.

Nobody is told that yrunner runs: what libraries would report by themselves is switched off.
"""

import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from yrunner.console import fail
from yrunner.errors import REPORT_A_BUG, YRunnerError

STOPPED = "stopped"

WHAT_TO_DO = {
    errno.ENOSPC: "Free some space on the disk; a run goes on from its last checkpoint by --resume",
    errno.EDQUOT: "Free some of your quota; a run goes on from its last checkpoint by --resume",
    errno.EACCES: "Set the permissions so that it can be read and written, or choose another place",
    errno.EPERM: "Set the permissions so that it can be written, or choose another place",
    errno.EROFS: "Choose a place that can be written, such as output=/another/folder",
    errno.ENOTDIR: "A file stands where a folder is needed; move it, or choose another place",
    errno.ENAMETOOLONG: "Choose a shorter name or another place",
    errno.ELOOP: "A link stands where a file is needed; remove it, or choose another place",
    errno.EIO: "The disk or its connection fails; look at it before you run the command again",
}
"""Faults of the disk that a person can mend, wherever they happen."""


def say_ending(_code: int, message: str) -> None:
    """Print why a command stops."""
    if message:
        fail(message)


def run_to_exit(
    command: Callable[[], object], tell: Callable[[int, str], object] = say_ending
) -> None:
    """Run it; exit with 2 for what the user can mend, 3 for what is missing, 1 for a bug.

    `tell` is given the exit code, and why it is not 0.
    """
    try:
        command()
    except YRunnerError as error:
        tell(error.exit_code, str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        tell(128 + signal.SIGINT, STOPPED)
        sys.exit(128 + signal.SIGINT)
    except SystemExit as error:
        # What typer makes of a command that has come to its end.
        tell(error.code if isinstance(error.code, int) else 1, "")
        raise
    except BrokenPipeError:
        # The reader went away (`yrun schema | head`); that is no fault of anybody.
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:  # noqa: BLE001  the last place
        if isinstance(error, OSError) and error.errno in WHAT_TO_DO:
            why = f"{error.filename or 'writing'}: {error.strerror}. {WHAT_TO_DO[error.errno]}"
            tell(2, why)
            sys.exit(2)
        tell(1, f"{traceback.format_exc()}{REPORT_A_BUG}")
        sys.exit(1)
    tell(0, "")


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """For heavy imports: inside a C++ module, KeyboardInterrupt would abort the process."""

    def stop(_number: int, _frame: object) -> None:
        fail(STOPPED)
        os._exit(128 + signal.SIGINT)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def check_recipe(recipe: Path, overrides: list[str] | None) -> None:
    """Answer a faulty recipe at once, before torch is imported."""
    from yrunner.recipe.load import alert_of_code, load_recipe

    alert_of_code(load_recipe(recipe, overrides or []))


NO_NEWS = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "DeepSpeed": "Setting accelerator to CPU",
    "accelerate.accelerator": "Gradient accumulation steps mismatch",
}
"""Beginnings or parts of such messages, by the name of the logger."""


def hide_what_is_no_news() -> None:
    """Let these messages, and no others, be dropped."""
    for name, message in NO_NEWS.items():
        logging.getLogger(name).addFilter(partial(_is_news, message))
    # DeepSpeed calls what torch will rename one day.
    warnings.filterwarnings("ignore", "`torch.distributed.", FutureWarning)


def _is_news(known: str, record: logging.LogRecord) -> bool:
    return known not in str(record.msg)


SWITCHES = {
    "DO_NOT_TRACK": "1",  # the common sign; the Hub's client and others look at it
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}
"""Environment variables that the libraries read when they are imported; none changes a result."""


def switch_off_telemetry() -> None:
    """Do so for this process and for those that it starts; what a person has set stays."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
