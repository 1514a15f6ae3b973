"""Models on this machine: local folders and their weight files, found without a download."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

from yrunner.models.adapters import CONFIG_FILE, read_base
from yrunner.models.errors import INDEX_FILE, explain_failure


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
