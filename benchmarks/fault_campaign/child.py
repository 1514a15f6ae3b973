"""A command of yrun in a process of its own, which can be killed, or disturbed, at any moment.

The process is a fork of one that has imported everything: torch and its friends take ten seconds
to import, a command on a tiny model takes one or two.
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

LONGEST_SECONDS = 900
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
"""Events of Python's auditing by which a file system is changed, besides the opening of files."""


@dataclass(frozen=True)
class Disturbance:
    """What happens to a command, before the operation on files of this number, from 1."""

    operation: int
    act: Callable[[], None]


@dataclass(frozen=True)
class Ending:
    """How a command ended."""

    code: int | None
    """Its exit code; None where it was killed."""
    output: str
    """What it printed, errors included."""
    seconds: float
    operations: int
    """How often it has opened or changed a file of the project."""


def kill_oneself() -> None:
    """SIGKILL: nothing of the process runs any more."""
    os.kill(os.getpid(), signal.SIGKILL)


def import_everything() -> None:
    """Import, once for all children, what the commands import.

    A child that gives up its rights may not read Python's own files any more: encodings are such.
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

    assert encodings and matplotlib and transformers and yrunner, "imported for their sake"
    if find_spec("deepspeed"):  # Trainer imports it wherever it is installed
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

    `killed_after`: seconds after which SIGKILL comes. `prepare` is called in the new process first.
    """
    counter = mmap.mmap(-1, 8)
    with TemporaryFile() as output:
        started = time.monotonic()
        child = os.fork()
        if not child:
            _be_the_command(arguments, project, output, counter, disturbance, prepare)
        code = _wait(child, killed_after)
        seconds = time.monotonic() - started
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Ending(code, text, seconds, int.from_bytes(counter[:], "little"))


def _wait(child: int, killed_after: float | None) -> int | None:
    limit = LONGEST_SECONDS if killed_after is None else killed_after
    watched = os.pidfd_open(child)
    ended, _, _ = select.select([watched], [], [], limit)
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.close(watched)
    _, status = os.waitpid(child, 0)
    if not ended and killed_after is None:
        raise TimeoutError(f"a command has not ended after {LONGEST_SECONDS} seconds")
    code = os.waitstatus_to_exitcode(status)
    return None if code == -signal.SIGKILL else code


def _be_the_command(
    arguments: Sequence[str],
    project: Path,
    output: Any,
    counter: mmap.mmap,
    disturbance: Disturbance | None,
    prepare: Callable[[], None] | None,
) -> None:
    """Never returns: the process ends here, whatever happens."""
    code = 1
    gc.freeze()  # garbage need not be looked for in all that was imported
    try:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        os.chdir(project)
        if prepare is not None:
            prepare()
        _watch_files(project, counter, disturbance)
        code = _run_command(arguments)
    except BaseException:  # noqa: BLE001  a fork must not go on with what its parent does
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
    """Count the operations on files of the project, and disturb the command before one of them."""
    count = 0
    inside = f"{project}{os.sep}"

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in CHANGES and event != "open":
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
