"""Start and end of every command: silenced libraries, the early check of the recipe, exit codes."""

import atexit
import errno
import gc
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from yrunner.console import fail, say, waiting
from yrunner.errors import REPORT_A_BUG, STOPPED, YRunnerError

if TYPE_CHECKING:
    from yrunner.recipe.schema.recipe import Recipe

DISK_REMEDIES = {
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
"""Remedies for disk errors that the user can fix, wherever they occur."""
HARMLESS_WARNINGS = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    "DeepSpeed": "Setting accelerator to CPU",
    "accelerate.accelerator": "Gradient accumulation steps mismatch",
}
"""Part of each warning, by the name of its logger."""
UNNEEDED = ("bitsandbytes", "scipy")
"""What peft and transformers import, each as long as peft itself, for weights in 4 or 8 bits, whose
code imports it again, and for the losses of image models."""
OBJECTS_BEFORE_COLLECTING = 10_000
"""While importing, which leaves hardly any garbage, and hundreds of thousands of objects."""
TELEMETRY_SWITCHES = {
    "DO_NOT_TRACK": "1",  # honoured by the Hub's client and others
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}
"""Environment variables that libraries read on import; none changes results."""


def print_ending(_code: int, message: str) -> None:
    """Print why the command failed."""
    if message:
        fail(message)


_REPORT: ContextVar[Callable[[int, str], object]] = ContextVar("_REPORT", default=print_ending)
"""What reports how the command ends: for a handler of a signal, which ends the process itself."""


def disable_telemetry() -> None:
    """Turn off the libraries' telemetry, here and in child processes, unless the user set it."""
    for name, value in TELEMETRY_SWITCHES.items():
        os.environ.setdefault(name, value)


def silence_harmless_warnings() -> None:
    """Drop exactly these warnings."""
    for name, message in HARMLESS_WARNINGS.items():
        logging.getLogger(name).addFilter(partial(_differs, message))
    # DeepSpeed calls functions that torch has deprecated.
    warnings.filterwarnings("ignore", "`torch.distributed.", FutureWarning)


def check_recipe(recipe: Path, overrides: list[str] | None) -> "Recipe":
    """Report faults of the recipe before torch is imported."""
    from yrunner.recipe.load import load_recipe, warn_of_remote_code

    loaded = load_recipe(recipe, overrides or [])
    warn_of_remote_code(loaded)
    return loaded


def say_intent(recipe: "Recipe") -> None:
    """Say within a second what is going to be trained; imports and data take longer."""
    base = recipe.model.base
    model = "a new model" if base is None else Path(base).name if Path(base).exists() else base
    say(
        f"{recipe.name}: {recipe.train.stage} of {model}, tuning {recipe.tuning.kind}, "
        f"loss {recipe.loss.kind}, to {recipe.run_folder}"
    )


@contextmanager
def exiting_on_interrupt() -> Iterator[None]:
    """Around the imports of a command, which take seconds: exit at once on Ctrl-C.

    In the midst of C++ modules a KeyboardInterrupt would abort.
    """

    def stop(_number: int, _frame: object) -> None:
        _REPORT.get()(128 + signal.SIGINT, STOPPED)
        os._exit(128 + signal.SIGINT)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        with (
            waiting("loading torch and transformers"),
            seemingly_absent(*UNNEEDED),
            collecting_rarely(),
        ):
            yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def collecting_rarely() -> Iterator[None]:
    """Hardly collect garbage during the imports of a process, and never search their objects again.

    Python would search all objects whenever their number has grown by a quarter, and the modules
    and classes, which stay to the end, in every later collection too.
    """
    if "torch" in sys.modules:
        # Not its first imports: freezing would keep the garbage of what it has done before.
        yield
        return
    before = gc.get_threshold()
    gc.set_threshold(OBJECTS_BEFORE_COLLECTING, before[1], OBJECTS_BEFORE_COLLECTING)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.freeze()


@contextmanager
def seemingly_absent(*modules: str) -> Iterator[None]:
    """Let modules that are not imported yet seem not to be installed.

    Libraries import others if they can, whether they are used or not.
    """
    hidden = [module for module in modules if module not in sys.modules]
    for module in hidden:
        sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in hidden:
            del sys.modules[module]


def run_to_exit(
    command: Callable[[], object], report: Callable[[int, str], object] = print_ending
) -> None:
    """Run the command; exit with 2 for a user error, 3 for something missing, 1 for a bug.

    `report` receives the exit code, and a message if it is not 0.
    """
    _REPORT.set(report)
    try:
        command()
    except YRunnerError as error:
        report(error.exit_code, str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        report(128 + signal.SIGINT, STOPPED)
        sys.exit(128 + signal.SIGINT)
    except SystemExit as error:
        # Typer raises this when a command has finished, and instead of a KeyboardInterrupt.
        code = error.code if isinstance(error.code, int) else 1
        report(code, STOPPED if code == 128 + signal.SIGINT else "")
        raise
    except BrokenPipeError:
        # The reader has closed the pipe (`yrun schema | head`); not an error.
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:  # noqa: BLE001  the outermost handler
        if isinstance(error, OSError) and error.errno in DISK_REMEDIES:
            why = f"{error.filename or 'writing'}: {error.strerror}. {DISK_REMEDIES[error.errno]}"
            report(2, why)
            sys.exit(2)
        report(1, f"{traceback.format_exc()}{REPORT_A_BUG}")
        sys.exit(1)
    report(0, "")


def run_program(program: Callable[[], object]) -> None:
    """Run a program, and end the process without taking it apart, which takes libraries a second.

    What is due when Python ends is done before: threads have ended, functions of `atexit` are
    called, and files are flushed.
    """
    code = 1

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a closed pipe
                stream.flush()
        os._exit(code)

    atexit.register(leave)  # the first to be registered is the last to be called
    try:
        program()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise


def _differs(known: str, record: logging.LogRecord) -> bool:
    return known not in str(record.msg)
