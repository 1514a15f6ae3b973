"""The weights in a model's files, one at a time: a model may be larger than memory."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from yrunner.errors import ModelError
from yrunner.models.at_hand import INDEX_FILE, local_folder
from yrunner.models.failures import explain_failure
from yrunner.models.hub import only_cached
from yrunner.models.load import check_folder
from yrunner.models.quiet import quiet_libraries

WEIGHTS_FILE = "model.safetensors"
NEEDED = ["*.json", "*.safetensors", "*.py", "*.jinja", "README.md"]
"""What a merge reads of a model on the Hub; weights that are pickled stay there."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder with safetensors files."""

    folder: Path
    sizes: Mapping[str, Tensor]
    """Shape and dtype of every weight, as tensors without memory."""
    places: Mapping[str, tuple[Path, int]]
    """The file that each weight is in, and its first byte there."""

    def read(self, name: str) -> Tensor:
        """One weight, on the CPU."""
        # Not by safetensors: it maps the file, whose pages would be in memory beside their copy.
        (path, start), size = self.places[name], self.sizes[name]
        raw = np.fromfile(path, np.uint8, count=size.numel() * size.element_size(), offset=start)
        return torch.from_numpy(raw).view(size.dtype).reshape(size.shape)

    def main_dtype(self) -> torch.dtype:
        """The dtype that most of the numbers have."""
        numbers: Counter[torch.dtype] = Counter()
        for weight in self.sizes.values():
            numbers[weight.dtype] += weight.numel()
        return numbers.most_common(1)[0][0]


def open_checkpoint(source: str) -> Checkpoint:
    """The checkpoint of a folder or a Hub id, which is downloaded if need be.

    Only headers are read. Raises `ModelError` for a source without whole safetensors files.
    """
    folder = _model_folder(source)
    check_folder(folder)
    index = folder / INDEX_FILE
    if index.is_file():
        with explain_failure(str(index)):
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    else:
        names = [WEIGHTS_FILE]
    sizes: dict[str, Tensor] = {}
    places: dict[str, tuple[Path, int]] = {}
    for path in (folder / name for name in names):
        if not path.is_file():
            raise ModelError(f"{folder} lacks {path.name}", remedy="download the model again")
        sizes |= _read_sizes(path)
        places |= _read_places(path)
    return Checkpoint(folder, sizes, places)


def _model_folder(source: str) -> Path:
    folder = local_folder(source)
    if folder is not None:
        return folder
    with quiet_libraries(keep_progress=True), explain_failure(source):
        cached = only_cached(source)
        return Path(snapshot_download(source, allow_patterns=NEEDED, local_files_only=cached))


def _read_sizes(path: Path) -> dict[str, Tensor]:
    with explain_failure(str(path)), safe_open(path, framework="pt") as weights:
        # The file is mapped into memory, and none of its pages are read for this.
        return {name: weights.get_tensor(name).to("meta") for name in weights.keys()}


def _read_places(path: Path) -> dict[str, tuple[Path, int]]:
    """Where each weight begins: behind its offset stand the header and the header's length."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: (path, 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }
