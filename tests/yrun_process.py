"""`yrun` in a process of its own, which can be watched and gets real signals.

Importing torch, transformers and peft takes ten seconds of a core, and this process has done it.
So `yrun` runs in a fork of it, with its own folder, environment, streams and signals.
"""

import gc
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

SAID, ERRORS = Path("said"), Path("errors")
"""Files of the current folder with what the process has printed."""
HANGS_AFTER = 600
"""Seconds after which a process hangs: it may be slow on a machine that has much else to do."""


def start_yrun(*arguments: str) -> BaseProcess:
    """Run `yrun` in the current folder."""
    from benchmarks.processes import START_METHOD

    process = multiprocessing.get_context(START_METHOD).Process(target=_be_yrun, args=(arguments,))
    process.start()
    return process


def wait_until(seen: Callable[[], bool], process: BaseProcess) -> None:
    """Wait for something that a process does while it runs."""
    while not seen():
        assert process.is_alive(), ERRORS.read_text()
        time.sleep(0.05)


def ending(process: BaseProcess) -> int:
    """The exit code of a process that is about to end."""
    process.join(timeout=HANGS_AFTER)
    assert process.exitcode is not None, "it has not ended"
    return process.exitcode


@pytest.fixture
def forks() -> Iterator[None]:
    """The same throughout a test."""
    with forking():
        yield


@contextmanager
def forking() -> Iterator[None]:
    """Let `subprocess` start Python's programs as forks of this process, which has imported all.

    So do the programs that these start. Streams, folder, environment, session, signals and exit
    code are those of `subprocess`, which forks anyway; only what follows is left out, an empty
    Python. (/proc shows the environment of this process.) Not with CUDA, which does not work in a
    fork.
    """
    from benchmarks.processes import START_METHOD

    start = subprocess.Popen.__init__

    def start_fork(self: Any, args: Any, *more: Any, **options: Any) -> None:
        run = _program(args)
        if run is not None and not more:
            before = options.get("preexec_fn")
            options["preexec_fn"] = partial(_be, run, options.get("env"), before)
        start(self, args, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        if START_METHOD == "fork":
            patch.setattr(subprocess.Popen, "__init__", start_fork)
        yield


def _program(command: Any) -> Callable[[], object] | None:
    """Run what the command runs; None if that needs a new Python."""
    if isinstance(command, str | bytes | os.PathLike):
        return None
    python, *words = [word for word in command if word not in ("-u", "-P")]
    match words if python == sys.executable else ():
        case ["-m", module, *arguments]:
            return partial(_run_module, module, arguments)
        case ["-c", text, *arguments]:
            return partial(_run_text, text, arguments)
    return None


def _run_module(module: str, arguments: list[str]) -> None:
    sys.argv = [module, *arguments]
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _run_text(text: str, arguments: list[str]) -> None:
    sys.argv = ["-c", *arguments]
    exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})


def _be(
    run: Callable[[], object],
    environment: Mapping[str, str] | None,
    before: Callable[[], object] | None,
) -> None:
    """Be a new Python that runs a program; never returns."""
    from benchmarks.processes import reset_distributed_state

    code = 1
    gc.freeze()  # no file of the parent may be closed later, when its number is that of another
    try:
        if before is not None:
            before()
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # `subprocess` does this too, a moment later
        resource_tracker._resource_tracker._fd = None
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        tempfile.tempdir = None  # it is looked up there
        sys.stdin, sys.stdout, sys.stderr = (
            open(stream, mode, buffering=1, closefd=False) for stream, mode in enumerate("rww")
        )
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logging.getLogger().handlers.clear()  # those of pytest
        for name in logging.root.manager.loggerDict:
            for handler in logging.getLogger(name).handlers:
                if type(handler) is logging.StreamHandler:
                    handler.stream = sys.stderr  # a library has that of its import
        reset_distributed_state()
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:  # noqa: BLE001  a fork must not return to the code of its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _be_yrun(arguments: tuple[str, ...]) -> None:
    from yrunner.cli import main

    for stream, path in ((1, SAID), (2, ERRORS)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    # In the place of those of pytest, which capture.
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    sys.argv = ["yrun", *arguments]
    main()
