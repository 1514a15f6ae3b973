"""Start of every command: check the recipe before heavy imports.

Turn errors into exit codes: the only place that catches them.

Silence known harmless warnings of libraries.

Turn off the libraries' telemetry.
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
    errno.ENOSPC: "Free some disk space; --resume continues a run from its last checkpoint",
    errno.EDQUOT: "Free some of your quota; --resume continues a run from its last checkpoint",
    errno.EACCES: "Make it readable and writable, or choose another path",
    errno.EPERM: "Make it writable, or choose another path",
    errno.EROFS: "Choose a writable path, such as output=/another/folder",
    errno.ENOTDIR: "There is a file where a folder is needed; move it, or choose another path",
    errno.ENAMETOOLONG: "Choose a shorter path",
    errno.ELOOP: "There is a symlink where a file is needed; remove it, or choose another path",
    errno.EIO: "The disk or its connection is failing; check it before you run the command again",
}
"""Disk errors that the user can fix, wherever they occur."""


def say_ending(_code: int, message: str) -> None:
    """Print why the command failed."""
    if message:
        fail(message)


def run_to_exit(
    command: Callable[[], object], tell: Callable[[int, str], object] = say_ending
) -> None:
    """Run the command; exit with 2 for a user error, 3 for something missing, 1 for a bug.

    `tell` receives the exit code, and a message if it is not 0.
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
        # Typer raises this when a command has finished.
        tell(error.code if isinstance(error.code, int) else 1, "")
        raise
    except BrokenPipeError:
        # The reader has closed the pipe (`yrun schema | head`); not an error.
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:  # noqa: BLE001  the outermost handler
        if isinstance(error, OSError) and error.errno in WHAT_TO_DO:
            why = f"{error.filename or 'writing'}: {error.strerror}. {WHAT_TO_DO[error.errno]}"
            tell(2, why)
            sys.exit(2)
        tell(1, f"{traceback.format_exc()}{REPORT_A_BUG}")
        sys.exit(1)
    tell(0, "")


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Exit at once on Ctrl-C: during imports of C++ modules a KeyboardInterrupt would abort."""

    def stop(_number: int, _frame: object) -> None:
        fail(STOPPED)
        os._exit(128 + signal.SIGINT)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def check_recipe(recipe: Path, overrides: list[str] | None) -> None:
    """Report faults of the recipe before torch is imported."""
    from yrunner.recipe.load import alert_of_code, load_recipe

    alert_of_code(load_recipe(recipe, overrides or []))


NO_NEWS = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "DeepSpeed": "Setting accelerator to CPU",
    "accelerate.accelerator": "Gradient accumulation steps mismatch",
}
"""Part of each message, by the name of its logger."""


def hide_what_is_no_news() -> None:
    """Drop exactly these messages."""
    for name, message in NO_NEWS.items():
        logging.getLogger(name).addFilter(partial(_is_news, message))
    # DeepSpeed calls functions that torch has deprecated.
    warnings.filterwarnings("ignore", "`torch.distributed.", FutureWarning)


def _is_news(known: str, record: logging.LogRecord) -> bool:
    return known not in str(record.msg)


SWITCHES = {
    "DO_NOT_TRACK": "1",  # honoured by the Hub's client and others
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}
"""Environment variables that libraries read on import; none changes results."""


def switch_off_telemetry() -> None:
    """Set them for this process and its children, unless the user has set them."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
