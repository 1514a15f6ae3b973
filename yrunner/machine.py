"""This machine, which other programs use too: its free memory, and its cores.

torch's threads spin while they wait for each other. Where another program takes a core from one of
them, all of them wait for it, and two trainings beside each other become many times slower. With a
thread per free core none of them waits. Another number of threads changes the last digits of sums.
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

CGROUP = Path("/sys/fs/cgroup")
NO_LIMIT = 2**60
"""cgroup v1 writes a huge number for "no limit"."""
MMAP_THRESHOLD = 2**20
M_MMAP_THRESHOLD = -3
"""The constant in glibc's malloc.h."""

KEPT_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "1"}
"""How many compiled matrix products oneDNN keeps on a CPU, and torch once more, each for one shape.
A batch of another length needs about 30 others of 0.4 MB, and the thousand that are kept by default
are hardly used again. Those of one length, which all layers share, are enough."""

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Environment variables by which a user or a launcher has decided."""
SECONDS_BETWEEN_LOOKS = 2.0
STATISTICS, STATUS = Path("/proc/stat"), Path("/proc/self/status")
IDLE_FIELDS = (3, 4)
"""`idle` and `iowait` among the times of a core; see proc(5). `steal` counts as used by others."""
NUM_FIELDS = 8


def free_memory() -> int:
    """Bytes free for a model on this machine, within a container's limit, and on its GPU if any."""
    free = [psutil.virtual_memory().available]
    container = cgroup_memory()
    if container is not None:
        free.append(container.free)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        free.append(torch.cuda.mem_get_info()[0])
    return min(free)


@dataclass(frozen=True)
class CgroupMemory:
    """Memory of all processes of a container, in bytes."""

    limit: int
    used: int

    @property
    def free(self) -> int:
        """Bytes that can still be allocated."""
        return self.limit - self.used


def cgroup_memory() -> CgroupMemory | None:
    """The memory limit of this container, cgroup v2 or v1; None if there is none."""
    return _read_cgroup(
        CGROUP, limit="memory.max", used="memory.current", cached="inactive_file"
    ) or _read_cgroup(
        CGROUP / "memory",
        limit="memory.limit_in_bytes",
        used="memory.usage_in_bytes",
        cached="total_inactive_file",
    )


def _read_cgroup(folder: Path, *, limit: str, used: str, cached: str) -> CgroupMemory | None:
    if not (folder / limit).is_file():
        return None
    text = (folder / limit).read_text().strip()
    if text == "max" or int(text) >= NO_LIMIT:
        return None
    # Cached pages of files count as used but are reclaimed on demand.
    lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    reclaimable = next((int(number) for name, number in lines if name == cached), 0)
    return CgroupMemory(int(text), int((folder / used).read_text()) - reclaimable)


def limit_kept_kernels() -> None:
    """Before torch is imported; what the user has set stays."""
    for name, number in KEPT_KERNELS.items():
        os.environ.setdefault(name, number)


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """The most bytes of this process that were in memory at once; without Linux: those of now."""
    status = STATUS.read_text("ascii") if STATUS.exists() else ""
    _, found, rest = status.partition("VmHWM:")
    return int(rest.split()[0]) * 1024 if found else resident_memory()


def lower_mmap_threshold() -> None:
    """Let glibc return freed blocks of a megabyte or more to the system at once.

    By default the threshold grows to 32 megabytes, and a program that frees one weight after the
    other retains a hundred unused megabytes. Other C libraries are not affected.
    """
    mallopt = _function_of_glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)


def return_freed_memory() -> None:
    """Let glibc return all pages that hold nothing to the system; nothing with other C libraries.

    Batches of many lengths leave gaps between what is kept, so a program that never does this takes
    more and more. To get the pages again costs a few percent of the time of an update.
    """
    malloc_trim = _function_of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


@cache
def _function_of_glibc(name: str) -> Any:
    """None where the C library has no such function."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


class SharedProcessor:
    """Sets the number of threads by what other programs used since the last look."""

    def __init__(
        self,
        used_by_all: Callable[[], float],
        used_by_us: Callable[[], float],
        clock: Callable[[], float],
        num_cores: int,
    ) -> None:
        """The first two: seconds of core time since any fixed moment."""
        self._counters = (clock, used_by_all, used_by_us)
        self._clock = clock
        self._num_cores = num_cores
        self._last: tuple[float, float, float] | None = None
        self._most: int | None = None
        self._wished: int | None = None

    def _read(self) -> tuple[float, float, float]:
        clock, used_by_all, used_by_us = self._counters
        return clock(), used_by_all(), used_by_us()

    def look(self, torch: Any) -> None:
        """Set the number of torch's threads; nearly free, and nothing within 2 s of the last."""
        if self._last is None:
            self._last, self._most = self._read(), torch.get_num_threads()
            return
        if self._clock() - self._last[0] < SECONDS_BETWEEN_LOOKS:
            return
        now = self._read()
        seconds, used, own = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now
        free = self._num_cores - max(0.0, used - own) / seconds
        number = max(1, min(self._most or 1, round(free)))
        # More threads only if two looks agree: a program that waits for a moment goes on.
        is_sure = number < torch.get_num_threads() or number == self._wished
        self._wished = number
        if is_sure and number != torch.get_num_threads():
            torch.set_num_threads(number)


def look_around() -> None:
    """Adapt the number of threads, where torch computes on cores that it shares.

    Long work calls it from the thread that computes, often. A number or a policy that the user has
    set in the environment stays.
    """
    torch, shared = sys.modules.get("torch"), _this_processor()
    if shared is not None and torch is not None and not torch.cuda.is_available():
        shared.look(torch)


def used_by_all(cores: frozenset[int], statistics: Path = STATISTICS) -> float:
    """Seconds that any program has used these cores since the machine started."""
    ticks = 0
    for line in statistics.read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            times = list(map(int, fields[:NUM_FIELDS]))
            ticks += sum(times) - sum(times[field] for field in IDLE_FIELDS)
    return ticks / os.sysconf("SC_CLK_TCK")


@cache
def _this_processor() -> SharedProcessor | None:
    if not STATISTICS.exists() or any(name in os.environ for name in SETTINGS):
        return None
    cores = frozenset(os.sched_getaffinity(0))
    return SharedProcessor(
        lambda: used_by_all(cores), time.process_time, time.monotonic, len(cores)
    )
