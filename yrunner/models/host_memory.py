"""Memory of this machine: what is free for a model, a container's limit, and malloc's settings."""

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
NO_LIMIT = 2**60
"""cgroup v1 writes a huge number for "no limit"."""
MMAP_THRESHOLD = 2**20
M_MMAP_THRESHOLD = -3
"""The constant in glibc's malloc.h."""


def free_memory() -> int:
    """Bytes free for a model on this machine, within a container's limit, and on its GPU if any."""
    free = [psutil.virtual_memory().available]
    container = cgroup_memory()
    if container is not None:
        free.append(container.free)
    # Imported here: `yrun doctor` reads the limit of a container without torch.
    import torch

    if torch.cuda.is_available():
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


def lower_mmap_threshold() -> None:
    """Let glibc return freed blocks of a megabyte or more to the system at once.

    By default the threshold grows to 32 megabytes, and a program that frees one weight after the
    other retains a hundred unused megabytes. Other C libraries are not affected.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
