"""Models on this machine: local folders and their weight files, found without a download."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from safetensors import safe_open

from yrunner.errors import ModelError
from yrunner.models.adapters import CONFIG_FILE, read_base
from yrunner.models.errors import INDEX_FILE, explain_failure, silence_libraries
from yrunner.models.hub import only_cached
from yrunner.recipe.schema.section import how_to_fetch

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""In the headers of safetensors files."""
GGUF = ".gguf"
ORIGIN = "gguf.json"
"""In the folder of an unpacked GGUF file: where its model came from."""


def find_gguf(source: str) -> Path | None:
    """The GGUF file that a model consists of; None for a model in another format.

    `source`: a file, a folder that holds one, or a file on the Hub, `owner/name/file.gguf`, which
    is downloaded if necessary. Raises `ModelError` for a folder with several, or without a model.
    """
    path = Path(source)
    if path.is_dir():
        if (path / "config.json").exists() or (path / CONFIG_FILE).exists():
            return None
        # Beside a model that sees there is a second file, of its eyes.
        found = sorted(file for file in path.glob(f"*{GGUF}") if "mmproj" not in file.name)
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ModelError(
                f"{path} has {len(found)} GGUF files ({names})", remedy="name one of them"
            )
        if not found:
            raise ModelError(
                f"{path} holds no model: it has neither config.json nor a GGUF file",
                remedy="check model.base",
            )
        return found[0]
    if not source.endswith(GGUF):
        return None
    if path.is_file():
        return path
    if source.startswith((".", "/", "~")) or source.count("/") < 2:
        command = how_to_fetch(source)
        remedy = f"run {command}" if command else "check the path"
        raise ModelError(f"there is no file {source}", remedy=remedy)
    owner, name, file = source.split("/", 2)
    with silence_libraries(keep_progress=True), explain_failure(source):
        cached = only_cached(f"{owner}/{name}")
        return Path(hf_hub_download(f"{owner}/{name}", file, local_files_only=cached))


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


def read_origin(folder: Path) -> Any:
    """Where the model of an unpacked GGUF file came from; None for any other folder."""
    origin = folder / ORIGIN
    return json.loads(origin.read_text("utf-8")) if origin.is_file() else None


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


def stored_dtypes(files: Sequence[Path]) -> set[str]:
    """The dtypes of all weights as `DTYPE_NAMES` has them, from the headers of the files."""
    found = set()
    for file in files:
        with safe_open(file, framework="pt") as weights:
            found |= {weights.get_slice(name).get_dtype() for name in weights.keys()}
    return found


def count_weights(files: Sequence[Path]) -> int:
    """Number of weights, from the headers of the files. Raises `ModelError` for a damaged one."""
    count = 0
    for file in files:
        with explain_failure(str(file)), safe_open(file, framework="pt") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    return count
