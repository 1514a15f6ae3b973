"""How a run starts in several processes, and how they end: all together, the first failure said.

torch's elastic launcher starts them. Each tells what became of it in a file of its own, by
`tell_ending`, and waits to be ended: so the one that failed is known, and what its end would break
in the others is never heard of.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import psutil

from yrunner.distributed.topology import Topology
from yrunner.errors import RunError, YRunnerError

ENDINGS = "YRUNNER_ENDINGS"
"""Names the folder for what became of each process, to the processes."""
COMMAND = "YRUNNER_COMMAND"
"""Names the process that has started this one, and all that stand beside it."""
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_BETWEEN_WATCHES = 2.0
SECONDS_TO_END = 20
"""How long a process that failed waits to be ended, and the launcher for the last to stop."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Those that ask a run to stop; SLURM warns by the last."""


@dataclass(frozen=True)
class ProcessRank:
    """Where a process stands among all."""

    rank: int
    num_ranks: int


class RanksFailed(YRunnerError):
    """A process of the run failed; the message and the exit code are its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def current_place() -> ProcessRank | None:
    """The place that torch's launcher has given to this process; None where it stands alone."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return ProcessRank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def take_place() -> Callable[[int, str], None] | None:
    """As one of the processes of a launcher: only rank 0 speaks.

    Gives back how to tell the launcher of the end; None where nobody waits for that.
    """
    place = current_place()
    if place is None:
        return None
    is_heard = ENDINGS in os.environ
    if place.rank:
        # Whole streams: libraries write to them, too, and not only through Python.
        silence = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2) if is_heard else (1,):
            os.dup2(silence, stream)
    if not is_heard:
        return None
    tell_start(place)
    return partial(tell_ending, place)


def launch_command(layout: Topology, arguments: Sequence[str]) -> list[str]:
    """The command that starts the processes of this machine, each `yrun` with these arguments."""
    places = (
        ["--standalone"]
        if layout.address is None
        else [
            f"--nnodes={layout.num_machines}",
            f"--node-rank={layout.machine}",
            f"--master-addr={layout.address.rpartition(':')[0]}",
            f"--master-port={layout.address.rpartition(':')[2]}",
        ]
    )
    start = [sys.executable, "-m", "torch.distributed.run", *places]
    start += [f"--nproc-per-node={layout.processes}", "--max-restarts=0"]
    return [*start, "-m", "yrunner.cli", *arguments]


def run_ranks(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run the processes to their end.

    SIGINT and SIGTERM are passed on to all of them. Where one fails all are ended; raises
    `RanksFailed` with what it said, or `RunError` where it was killed and could say nothing.
    """
    with TemporaryDirectory(prefix="yrunner-") as folder:
        ranks = _Ranks(Path(folder))
        # LOGLEVEL: what the launcher has to say of a failure is known better from the endings.
        own = {ENDINGS: folder, COMMAND: str(os.getpid()), "LOGLEVEL": "CRITICAL"}
        # A group of its own: Ctrl-C in the terminal reaches us alone, and is passed on once.
        launcher = subprocess.Popen(
            command, env={**os.environ, **environment, **own}, process_group=0
        )
        try:
            with _passing_on(ranks) as signals:
                while launcher.poll() is None and not ranks.have_failed():
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                failure = ranks.failure(signals, launcher.poll())
        finally:
            # The launcher first: it would tell at length what is known here already.
            launcher.kill()
            launcher.wait()
            ranks.send(signal.SIGKILL)
    if failure is not None:
        raise failure


def tell_start(place: ProcessRank) -> None:
    """Let the launcher know this process."""
    _write(f"{place.rank}.pid", str(os.getpid()))


def end_with_command() -> None:
    """End this process when the command that has started it is gone, if there is one.

    Whatever has killed that: nobody would wait for this process, or could stop it by the command.
    """
    if COMMAND in os.environ:
        Thread(target=_end_with, args=(int(os.environ[COMMAND]),), daemon=True).start()


def tell_ending(place: ProcessRank, code: int, message: str) -> None:
    """Tell the launcher what became of this process; a failed one waits there to be ended."""
    ending = {"code": code, "message": message, "time": time.time()}
    _write(f"{place.rank}.json", json.dumps(ending))
    if code:
        time.sleep(SECONDS_TO_END)


def _write(name: str, text: str) -> None:
    path = Path(os.environ[ENDINGS], name)
    unfinished = path.with_name(f"{name}.partial")
    unfinished.write_text(text, "utf-8")
    unfinished.replace(path)


@dataclass(frozen=True)
class _Ending:
    rank: int
    code: int
    message: str
    time: float


class _Ranks:
    """The processes of this machine, as far as they have told of themselves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pids(self) -> dict[int, int]:
        files = self.folder.glob("*.pid")
        return {int(file.stem): int(file.read_text("utf-8")) for file in files}

    def endings(self) -> list[_Ending]:
        """In the order of time."""
        files = self.folder.glob("*.json")
        found = [_Ending(int(f.stem), **json.loads(f.read_text("utf-8"))) for f in files]
        return sorted(found, key=lambda ending: ending.time)

    def killed(self) -> list[int]:
        """Processes that are gone without a word."""
        gone = [rank for rank, pid in self.pids().items() if not _is_alive(pid)]
        told = {ending.rank for ending in self.endings()}
        return [rank for rank in gone if rank not in told]

    def have_failed(self) -> bool:
        return any(ending.code for ending in self.endings()) or bool(self.killed())

    def failure(self, signals: Sequence[int], code_of_launcher: int | None) -> YRunnerError | None:
        """Why the run failed; None where it did not."""
        killed = self.killed()
        if killed and signals:
            asked = signal.SIGINT if signals[0] == signal.SIGINT else signal.SIGTERM
            return RanksFailed("stopped", 128 + asked)
        if killed:
            return RunError(
                f"process {killed[0]} of the run was killed, perhaps for want of memory",
                remedy="go on by --resume, with a smaller train.batch_size if memory was short",
            )
        failed = [ending for ending in self._when_all_have_stopped() if ending.code]
        if failed:
            return RanksFailed(failed[0].message, failed[0].code)
        if code_of_launcher:
            return RunError(
                f"torch's launcher ended with code {code_of_launcher} before the run began",
                remedy="the lines above say why; --print-launch shows the command",
            )
        return None

    def send(self, number: int) -> None:
        """Send a signal to every process that is there."""
        for pid in self.pids().values():
            if _is_alive(pid):
                os.kill(pid, number)

    def _when_all_have_stopped(self) -> list[_Ending]:
        """The endings. Where a signal has stopped one, each stops after the same update."""
        deadline = time.monotonic() + SECONDS_TO_END / 2
        while True:
            endings = self.endings()
            stopped = any(ending.code > 128 for ending in endings)
            all_told = {ending.rank for ending in endings} >= set(self.pids())
            if not stopped or all_told or time.monotonic() > deadline:
                return endings
            time.sleep(SECONDS_BETWEEN_LOOKS)


@contextmanager
def _passing_on(ranks: _Ranks) -> Iterator[list[int]]:
    """Pass signals on to the processes; yields those that have come."""
    passed: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        passed.append(number)
        ranks.send(number)

    previous = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield passed
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _end_with(command: int) -> None:
    while _is_alive(command):
        time.sleep(SECONDS_BETWEEN_WATCHES)
    os.kill(os.getpid(), signal.SIGKILL)
