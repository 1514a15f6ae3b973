"""What of a model is on this machine already, and whether the machine has room for it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

from yrunner.models.adapters import CONFIG_FILE, read_base
from yrunner.models.container import container_memory
from yrunner.models.failures import explain_failure

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
