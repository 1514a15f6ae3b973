"""Run a yrun command in a child process that can be killed or disturbed at any moment.

The child is a fork of a process that has imported everything: importing torch takes ten seconds, a
command on a tiny model one or two.
"""

import gc
import mmap
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

TIMEOUT_SECONDS = 900
AUDITED_EVENTS = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
}
"""Audit events that change the file system, besides opening a file."""


@dataclass(frozen=True)
class Disturbance:
    """What to do to a command, before its n-th file operation, counted from 1."""

    operation: int
    act: Callable[[], None]


@dataclass(frozen=True)
class Ending:
    """How a command ended."""

    code: int | None
    """Exit code; None if it was killed."""
    output: str
    """Standard output and errors."""
    seconds: float
    operations: int
    """How often it opened or changed a file of the project."""


def kill_self() -> None:
    """Kill this process with SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def import_everything() -> None:
    """Import everything that the commands import, once for all children.

    A child that drops its privileges may no longer read Python's files, encodings for example.
    """
    import encodings.utf_8_sig

    import matplotlib.backends.backend_svg
    import transformers.models.qwen3.modeling_qwen3

    import yrunner.cli
    import yrunner.commands.check.command
    import yrunner.commands.eval.command
    import yrunner.commands.inspect.heat_map
    import yrunner.commands.merge.command
    import yrunner.commands.sort.command
    import yrunner.commands.train

    assert encodings and matplotlib and transformers and yrunner, "imported for the children"
    if find_spec("deepspeed"):  # Trainer imports it if it is installed
        import_module("deepspeed")


def run(
    arguments: Sequence[str],
    project: Path,
    *,
    killed_after: float | None = None,
    disturbance: Disturbance | None = None,
    prepare: Callable[[], None] | None = None,
) -> Ending:
    """Run `yrun` with these arguments in the folder `project`.

    `killed_after`: seconds until SIGKILL. `prepare` is called first in the child.
    """
    counter = mmap.mmap(-1, 8)
    with TemporaryFile() as output:
        started = time.monotonic()
        child = os.fork()
        if not child:
            _run_child(arguments, project, output, counter, disturbance, prepare)
        code = _wait(child, killed_after)
        seconds = time.monotonic() - started
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Ending(code, text, seconds, int.from_bytes(counter[:], "little"))


def _wait(child: int, killed_after: float | None) -> int | None:
    limit = TIMEOUT_SECONDS if killed_after is None else killed_after
    watched = os.pidfd_open(child)
    ended, _, _ = select.select([watched], [], [], limit)
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.close(watched)
    _, status = os.waitpid(child, 0)
    if not ended and killed_after is None:
        raise TimeoutError(f"a command did not end within {TIMEOUT_SECONDS} seconds")
    code = os.waitstatus_to_exitcode(status)
    return None if code == -signal.SIGKILL else code


def _run_child(
    arguments: Sequence[str],
    project: Path,
    output: Any,
    counter: mmap.mmap,
    disturbance: Disturbance | None,
    prepare: Callable[[], None] | None,
) -> None:
    """Run the command and exit; never returns."""
    code = 1
    gc.freeze()  # the garbage collector can skip everything that was imported
    try:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        os.chdir(project)
        if prepare is not None:
            prepare()
        _watch_files(project, counter, disturbance)
        code = _run_command(arguments)
    except BaseException:  # noqa: BLE001  a fork must not return to the code of its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_command(arguments: Sequence[str]) -> int:
    from yrunner.cli import main

    sys.argv = ["yrun", *arguments]
    try:
        main()
    except SystemExit as ending:
        return int(ending.code or 0)
    return 0


def _watch_files(project: Path, counter: mmap.mmap, disturbance: Disturbance | None) -> None:
    """Count the file operations in the project, and disturb the command before one of them."""
    count = 0
    inside = f"{project}{os.sep}"

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in AUDITED_EVENTS and event != "open":
            return
        path = details[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return
        if not os.path.abspath(os.fsdecode(path)).startswith(inside):
            return
        count += 1
        counter[:] = count.to_bytes(8, "little")
        if disturbance is not None and count == disturbance.operation:
            disturbance.act()

    sys.addaudithook(watch)
