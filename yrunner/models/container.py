"""The memory that a container may use: the limit of its control group, of either version."""

from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
NO_LIMIT = 2**60
"""Version 1 says "no limit" by a number above all memory there is."""


@dataclass(frozen=True)
class ContainerMemory:
    """Bytes that all processes of a container may hold, and what they hold now."""

    limit: int
    used: int

    @property
    def free(self) -> int:
        """Bytes that can still be taken."""
        return self.limit - self.used


def container_memory() -> ContainerMemory | None:
    """The limit that this process lives under; None where there is none."""
    return _read(
        CGROUP, limit="memory.max", used="memory.current", cached="inactive_file"
    ) or _read(
        CGROUP / "memory",
        limit="memory.limit_in_bytes",
        used="memory.usage_in_bytes",
        cached="total_inactive_file",
    )


def _read(folder: Path, *, limit: str, used: str, cached: str) -> ContainerMemory | None:
    if not (folder / limit).is_file():
        return None
    text = (folder / limit).read_text().strip()
    if text == "max" or int(text) >= NO_LIMIT:
        return None
    # Pages of files that were read count as used, but make room when something needs it.
    lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    room = next((int(number) for name, number in lines if name == cached), 0)
    return ContainerMemory(int(text), int((folder / used).read_text()) - room)
