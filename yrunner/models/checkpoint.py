"""The weights in a model's files, one at a time: a model may be larger than memory."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from yrunner.errors import ModelError
from yrunner.models.at_hand import INDEX_FILE, local_folder
from yrunner.models.failures import explain_failure
from yrunner.models.hub import only_cached
from yrunner.models.load import check_folder
from yrunner.models.quiet import quiet_libraries
from yrunner.models.weights_file import Place, find_weights

WEIGHTS_FILE = "model.safetensors"
NEEDED = ["*.json", "*.safetensors", "*.py", "*.jinja", "README.md"]
"""What a merge reads of a model on the Hub; weights that are pickled stay there."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder with safetensors files."""

    folder: Path
    places: Mapping[str, Place]
    """Where each weight is."""

    @property
    def sizes(self) -> dict[str, Tensor]:
        """Shape and dtype of every weight, as tensors without memory."""
        return {name: place.size for name, place in self.places.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One weight, on the CPU, in its own dtype or another."""
        return self.places[name].read(dtype)

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
    places: dict[str, Place] = {}
    for path in (folder / name for name in names):
        if not path.is_file():
            raise ModelError(f"{folder} lacks {path.name}", remedy="download the model again")
        places |= find_weights(path)
    return Checkpoint(folder, places)


def _model_folder(source: str) -> Path:
    folder = local_folder(source)
    if folder is not None:
        return folder
    with quiet_libraries(keep_progress=True), explain_failure(source):
        cached = only_cached(source)
        return Path(snapshot_download(source, allow_patterns=NEEDED, local_files_only=cached))
