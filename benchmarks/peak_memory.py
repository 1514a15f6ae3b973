"""Peak resident memory of a process, as Linux reports it."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment in which the C library returns freed blocks at once instead of keeping them."""


@contextmanager
def peak_above_now() -> Iterator[list[int]]:
    """Yield a list; after the block it holds the peak in bytes, less what was resident before."""
    import torch  # here, so that reading the peak of a light process stays light

    matrix = torch.ones(512, 512, requires_grad=True)
    (matrix @ matrix).sum().backward()  # allocates the libraries' own buffers and threads
    before = resident_bytes()
    peak: list[int] = []
    yield peak
    peak.append(peak_bytes() - before)


def peak_bytes(process_id: int | str = "self") -> int:
    """Peak of a running process, 0 once it has ended.

    `getrusage` would not do: after a fork it starts from the peak of the parent.
    """
    try:
        status = Path(f"/proc/{process_id}/status").read_text("ascii")
    except OSError:
        return 0
    _, found, rest = status.partition("VmHWM:")
    return int(rest.split()[0]) * 1024 if found else 0  # a zombie has no such line


def reset_peak() -> None:
    """Set the peak of this process to what it holds now."""
    Path("/proc/self/clear_refs").write_text("5", "ascii")


def resident_bytes() -> int:
    """What this process holds in memory now."""
    num_pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return num_pages * resource.getpagesize()
