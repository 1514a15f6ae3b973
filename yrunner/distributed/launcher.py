"""Launch a run in several processes: start all ranks, stop all on failure, report the first error.

torch's elastic launcher starts them. Each rank writes how it ended to a file, and a failed rank
then waits to be killed: so the first failure is known, and the others do not report the broken
connections that follow from it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import psutil

from yrunner.distributed.topology import Topology
from yrunner.errors import STOPPED, RunError, YRunnerError

ENDINGS = "YRUNNER_ENDINGS"
"""Environment variable: the folder where each rank writes how it ended."""
COMMAND = "YRUNNER_COMMAND"
"""Environment variable: the PID of the command that started the ranks."""
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_BETWEEN_WATCHES = 2.0
SECONDS_TO_END = 20
"""How long a failed rank waits to be killed; half of it, how long we wait for ranks to stop."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that stop a run; SLURM sends the last one as a warning."""


@dataclass(frozen=True)
class ProcessRank:
    """Rank and world size of a process."""

    rank: int
    num_ranks: int


class RanksFailed(YRunnerError):
    """A rank failed; message and exit code are those of the rank."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def current_rank() -> ProcessRank | None:
    """Rank and world size set by torch's launcher; None for a process without a launcher."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return ProcessRank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def set_up_rank() -> Callable[[int, str], None] | None:
    """Set up this process as a rank: silence all but rank 0, report an end by SIGTERM or SIGUSR1.

    Returns the function that reports how the rank ended; None if nobody waits for that report.
    """
    process = current_rank()
    if process is None:
        return None
    is_awaited = ENDINGS in os.environ
    if process.rank:
        # Redirect the file descriptors: libraries also write to them without Python.
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2) if is_awaited else (1,):
            os.dup2(null, stream)
    if not is_awaited:
        return None

    def stop(_number: int, _frame: object) -> None:
        report_ending(process, 128 + signal.SIGTERM, STOPPED)
        os._exit(128 + signal.SIGTERM)

    # Explicitly: what a script starts in the background inherits that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in SIGNALS[1:]:
        signal.signal(number, stop)
    _write(f"{process.rank}.pid", str(os.getpid()))
    return partial(report_ending, process)


def launch_command(topology: Topology, arguments: Sequence[str]) -> list[str]:
    """The command that starts this machine's ranks, each running `yrun` with these arguments."""
    rendezvous = (
        ["--standalone"]
        if topology.address is None
        else [
            f"--nnodes={topology.num_machines}",
            f"--node-rank={topology.machine}",
            f"--master-addr={topology.address.rpartition(':')[0]}",
            f"--master-port={topology.address.rpartition(':')[2]}",
        ]
    )
    start = [sys.executable, "-m", "torch.distributed.run", *rendezvous]
    start += [f"--nproc-per-node={topology.processes}", "--max-restarts=0"]
    return [*start, "-m", "yrunner.cli", *arguments]


def run_ranks(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run all ranks until they end.

    Forwards stop signals to every rank. If one fails, kills all and raises `RanksFailed` with its
    message, or `RunError` if it was killed and left no message.
    """
    with TemporaryDirectory(prefix="yrunner-") as folder:
        ranks = _Ranks(Path(folder))
        # LOGLEVEL: silences the launcher's report of a failure; the endings say more.
        own = {ENDINGS: folder, COMMAND: str(os.getpid()), "LOGLEVEL": "CRITICAL"}
        # A separate process group: Ctrl-C in the terminal reaches only us, and is forwarded once.
        launcher = subprocess.Popen(
            command, env={**os.environ, **environment, **own}, process_group=0
        )
        try:
            with _noting_signals() as signals:
                while launcher.poll() is None and not ranks.have_failed():
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                    ranks.forward(signals)
                failure = ranks.failure(signals, launcher.poll())
        finally:
            _end(launcher, ranks)
    if failure is not None:
        raise failure


def die_with_command() -> None:
    """Kill this process when the command that started it, if any, is gone.

    Otherwise it would keep its GPU, with nobody waiting for it or able to stop it.
    """
    if COMMAND in os.environ:
        Thread(target=_die_after, args=(int(os.environ[COMMAND]),), daemon=True).start()


def report_ending(process: ProcessRank, code: int, message: str) -> None:
    """Report how this rank ended; a failed rank then waits to be killed."""
    ending = {"code": code, "message": message, "time": time.time()}
    _write(f"{process.rank}.json", json.dumps(ending))
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
    """The ranks of this machine that have registered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._num_sent: dict[int, int] = {}

    def pids(self) -> dict[int, int]:
        files = self.folder.glob("*.pid")
        return {int(file.stem): int(file.read_text("utf-8")) for file in files}

    def endings(self) -> list[_Ending]:
        """The endings so far, the earliest first."""
        files = self.folder.glob("*.json")
        found = [_Ending(int(f.stem), **json.loads(f.read_text("utf-8"))) for f in files]
        return sorted(found, key=lambda ending: ending.time)

    def killed(self) -> list[int]:
        """Ranks that exited without reporting an ending."""
        gone = [rank for rank, pid in self.pids().items() if not _is_alive(pid)]
        reported = {ending.rank for ending in self.endings()}
        return [rank for rank in gone if rank not in reported]

    def have_failed(self) -> bool:
        return any(ending.code for ending in self.endings()) or bool(self.killed())

    def failure(self, signals: Sequence[int], code_of_launcher: int | None) -> YRunnerError | None:
        """Why the run failed; None if it did not."""
        killed = self.killed()
        if killed and signals:
            number = signal.SIGINT if signals[0] == signal.SIGINT else signal.SIGTERM
            return RanksFailed(STOPPED, 128 + number)
        if killed:
            return RunError(
                f"process {killed[0]} of the run was killed, possibly because memory ran out",
                remedy="continue with --resume, and a smaller train.batch_size if it was memory",
            )
        failed = [ending for ending in self._final_endings(signals) if ending.code]
        if failed:
            return RanksFailed(failed[0].message, failed[0].code)
        if code_of_launcher:
            return RunError(
                f"torch's launcher exited with code {code_of_launcher} before the run started",
                remedy="see the lines above; --print-launch shows the command",
            )
        return None

    def forward(self, signals: Sequence[int]) -> None:
        """Send every rank the signals that it has not received, which came before it registered."""
        for pid in self.pids().values():
            for number in signals[self._num_sent.get(pid, 0) :]:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
                self._num_sent[pid] = self._num_sent.get(pid, 0) + 1

    def _final_endings(self, signals: Sequence[int]) -> list[_Ending]:
        """The endings. After a stop signal, wait for all: they stop after the same update."""
        deadline = time.monotonic() + SECONDS_TO_END / 2
        while True:
            endings = self.endings()
            stopped = any(ending.code > 128 for ending in endings)
            all_reported = {ending.rank for ending in endings} >= set(self.pids())
            if not stopped or all_reported or time.monotonic() > deadline:
                return endings
            time.sleep(SECONDS_BETWEEN_LOOKS)
            self.forward(signals)


@contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """Note stop signals instead of ending by them; yields the list of signals received."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _frame: received.append(number))
        for number in SIGNALS
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end(launcher: subprocess.Popen[bytes], ranks: _Ranks) -> None:
    """Kill the launcher and all it started; returns when none of them can write a file any more."""
    try:
        started = {child.pid for child in psutil.Process(launcher.pid).children(recursive=True)}
    except psutil.NoSuchProcess:
        started = set()
    started.update(ranks.pids().values())
    # The launcher first, or it would print a long report of the failure.
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + SECONDS_TO_END
    while time.monotonic() < deadline:
        alive = [pid for pid in started if _is_alive(pid)]
        if not alive:
            return
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _die_after(command: int) -> None:
    while _is_alive(command):
        time.sleep(SECONDS_BETWEEN_WATCHES)
    os.kill(os.getpid(), signal.SIGKILL)
