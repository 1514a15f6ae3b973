"""What of a model is on this machine already, and whether the machine has room for it.

The memory that a container may use: the limit of its control group, of either version.

Freed memory goes back to the system at once, where the C library would keep it for later.
"""

import ctypes
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

from yrunner.models.adapters import CONFIG_FILE, read_base
from yrunner.models.errors import explain_failure

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


INDEX_FILE = "model.safetensors.index.json"


def local_folder(source: str) -> Path | None:
    """The folder of a model or adapter that can be loaded without a download; None: there is none.

    `source`: a folder, which is taken as it is, or a Hub id, whose folder is in the Hub's cache.
    """
    if Path(source).is_dir():
        return Path(source)
    for name in ("config.json", CONFIG_FILE):
        file = try_to_load_from_cache(source, name)
        # The cache also remembers, by an object of its own, that a file does not exist.
        if isinstance(file, str):
            folder = Path(file).parent
            return folder if _has_all_weights(folder) else None
    return None


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights; of an adapter also those of its base.

    None at all where the weights of that base would have to be downloaded.
    """
    own = sorted(folder.glob("*.safetensors"))
    if not (folder / CONFIG_FILE).is_file():
        return own
    base = local_folder(read_base(folder))
    files = [] if base is None else weight_files(base)
    return [*files, *own] if files else []


def count_weights(files: Sequence[Path]) -> int:
    """Numbers in the files of weights, read from their headers. Raises `ModelError` for damage."""
    count = 0
    for file in files:
        with explain_failure(str(file)), safe_open(file, framework="pt") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    return count


def free_memory() -> int:
    """Bytes that a model can still take on this machine, and on its GPU where it has one.

    A container's limit counts as the machine's.
    """
    free = [psutil.virtual_memory().available]
    container = container_memory()
    if container is not None:
        free.append(container.free)
    if torch.cuda.is_available():
        free.append(torch.cuda.mem_get_info()[0])
    return min(free)


def _has_all_weights(folder: Path) -> bool:
    """Whether the cache holds every file of weights: a download may have been interrupted."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    return all((folder / name).is_file() for name in names)


LARGE = 2**20
M_MMAP_THRESHOLD = -3
"""What malloc.h of glibc calls by this name."""


def give_back_freed_memory() -> None:
    """Let every block of a megabyte and more have pages of its own, which go when it is freed.

    Left alone, glibc raises that size to 32 megabytes, and a program that frees one weight after
    the other keeps a hundred megabytes that nobody uses. Other C libraries are left as they are.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE)
