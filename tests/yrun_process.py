"""`yrun` in a process of its own, which can be watched and gets real signals."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.processes import START_METHOD

SAID, ERRORS = Path("said"), Path("errors")
"""Files of the current folder with what the process has printed."""
HANGS_AFTER = 600
"""Seconds after which a process hangs: it may be slow on a machine that has much else to do."""


def start_yrun(*arguments: str) -> BaseProcess:
    """Run `yrun` in the current folder."""
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


def _be_yrun(arguments: tuple[str, ...]) -> None:
    from yrunner.cli import main

    for stream, path in ((1, SAID), (2, ERRORS)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    # In the place of those of pytest, which capture.
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    sys.argv = ["yrun", *arguments]
    main()
