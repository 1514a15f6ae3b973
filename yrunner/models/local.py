"""Models on this machine: their local files, and the memory that is free for them."""

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

INDEX_FILE = "model.safetensors.index.json"
CGROUP = Path("/sys/fs/cgroup")
NO_LIMIT = 2**60
"""cgroup v1 writes a huge number for "no limit"."""
MMAP_THRESHOLD = 2**20
M_MMAP_THRESHOLD = -3
"""The constant in glibc's malloc.h."""


def local_folder(source: str) -> Path | None:
    """The folder of a model or adapter that loads without a download; None if there is none.

    `source`: a folder, or a Hub id, which is looked up in the Hub's cache.
    """
    if Path(source).is_dir():
        return Path(source)
    for name in ("config.json", CONFIG_FILE):
        file = try_to_load_from_cache(source, name)
        # For files known not to exist the cache returns a sentinel object.
        if isinstance(file, str):
            folder = Path(file).parent
            return folder if _has_all_weights(folder) else None
    return None


def _has_all_weights(folder: Path) -> bool:
    """Whether all weight files are cached: a download may have been interrupted."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    return all((folder / name).is_file() for name in names)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model; for an adapter, those of its base too.

    Empty if the base would have to be downloaded.
    """
    own = sorted(folder.glob("*.safetensors"))
    if not (folder / CONFIG_FILE).is_file():
        return own
    base = local_folder(read_base(folder))
    files = [] if base is None else weight_files(base)
    return [*files, *own] if files else []


def count_weights(files: Sequence[Path]) -> int:
    """Number of weights, from the headers of the files. Raises `ModelError` for a damaged one."""
    count = 0
    for file in files:
        with explain_failure(str(file)), safe_open(file, framework="pt") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    return count


def free_memory() -> int:
    """Bytes free for a model on this machine, within a container's limit, and on its GPU if any."""
    free = [psutil.virtual_memory().available]
    container = cgroup_memory()
    if container is not None:
        free.append(container.free)
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
