"""Memory, disk and compiler: what can be seen without importing a heavy package."""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import psutil

from yrunner.commands.doctor_finding import Finding, found, missing
from yrunner.models.container import container_memory

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY = 10**9
"""What processes hand each other their tensors in: Docker's default of 64 MB is too little."""
LEAST_DISK = 2 * 10**9
"""A checkpoint of the smallest real models, an adapter and its optimizer, takes less."""


def look_at_machine(folder: Path) -> Iterator[Finding]:
    """Memory, disk and compiler of this machine; runs would be written below `folder`."""
    yield from _memory()
    yield from _disk(folder)
    yield from _compiler()


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    yield found("memory", "machine", _of(memory.available, memory.total))
    container = container_memory()
    if container is not None:
        yield found("memory", "container", _of(container.free, container.limit))
    if not SHARED_MEMORY.is_dir():
        return
    shared = shutil.disk_usage(SHARED_MEMORY)
    if shared.total >= LEAST_SHARED_MEMORY:
        yield found("memory", "shared", _of(shared.free, shared.total))
        return
    yield missing(
        "memory",
        "shared",
        f"{_of(shared.free, shared.total)}; several processes may need more",
        remedy="start the container with: docker run --shm-size=8g ...",
    )


def _disk(folder: Path) -> Iterator[Finding]:
    home = os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")
    for part, place in (("runs", folder), ("models of the Hub", Path(home))):
        here = _nearest(place)
        usage = shutil.disk_usage(here)
        where = f"{_of(usage.free, usage.total)} at {here}"
        if not os.access(here, os.W_OK):
            remedy = f"chmod u+w {here}, or choose a folder with output=/another/folder"
            why = f"{here} cannot be written"
            yield missing("disk", part, why, remedy=remedy, needed=part == "runs")
        elif usage.free < LEAST_DISK:
            remedy = f"free some space; see what takes it with: du -h -d 1 {here} | sort -h"
            yield missing("disk", part, where, remedy=remedy)
        else:
            yield found("disk", part, where)


def _compiler() -> Iterator[Finding]:
    """What DeepSpeed's operations and torch.compile are built with."""
    compiler = os.environ.get("CXX", "g++")
    header = Path(sysconfig.get_path("include"), "Python.h")
    for part, place, remedy in (
        ("C++", shutil.which(compiler), "apt-get install g++"),
        ("Python.h", header if header.exists() else None, "apt-get install python3-dev"),
        ("ninja", shutil.which("ninja"), _how_to_get_ninja()),
    ):
        if place is None:
            why = "not found; DeepSpeed and train.torch_compile build code with it"
            yield missing("compiler", part, why, remedy=remedy)
        else:
            yield found("compiler", part, str(place))


def _how_to_get_ninja() -> str:
    """It comes with DeepSpeed, but only an active environment has it on the path."""
    scripts = Path(sysconfig.get_path("scripts"))
    if (scripts / "ninja").exists():
        return f"source {scripts / 'activate'}"
    return "pip install ninja"


def _nearest(folder: Path) -> Path:
    """The folder, or the one above it that exists already."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _of(free: int, total: int) -> str:
    return f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB"
