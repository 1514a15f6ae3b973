"""The weights in a model's files, one at a time: a model may be larger than memory.

A file of weights in the form of safetensors, read and written one weight at a time.

The library of that name maps the files that it reads, whose pages are in memory beside their copy,
and writes a file from all of its weights at once. The form is simple: the length of a header, the
header in JSON, and the numbers of every weight.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from yrunner.errors import ModelError
from yrunner.models.errors import explain_failure, quiet_libraries
from yrunner.models.hub import only_cached
from yrunner.models.load import check_folder
from yrunner.models.local import INDEX_FILE, local_folder

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
STRETCH = 2**22
"""Numbers that are read at once."""


@dataclass(frozen=True)
class TensorLocation:
    """Where a weight is."""

    file: Path
    start: int
    """Its first byte in the file."""
    size: Tensor
    """Its shape and dtype, as a tensor without memory."""

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, on the CPU, in its own dtype or another; it is never there in both."""
        weight = torch.empty(self.size.shape, dtype=dtype or self.size.dtype)
        raw = torch.empty(min(STRETCH, self.size.numel()), dtype=self.size.dtype)
        with self.file.open("rb") as file:
            file.seek(self.start)
            for part in torch.split(weight.view(-1), STRETCH):
                file.readinto(_as_bytes(raw[: len(part)]))
                part.copy_(raw[: len(part)])
        return weight


def find_weights(file: Path) -> dict[str, TensorLocation]:
    """Every weight of a file by its name; only the header is read.

    Raises `ModelError` for a file that is damaged.
    """
    with explain_failure(str(file)), safe_open(file, framework="pt") as weights:
        # The file is mapped into memory, and none of its pages are read for this.
        sizes = {name: weights.get_tensor(name).to("meta") for name in weights.keys()}
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {
        name: TensorLocation(file, 8 + length + header[name]["data_offsets"][0], size)
        for name, size in sizes.items()
    }


def write_weights(file: Path, sizes: Mapping[str, Tensor], make: Callable[[str], Tensor]) -> None:
    """Write weights of these shapes and dtypes; `make` gives each by its name, in turn."""
    # The wider dtypes first, so that every number begins where its width wants it.
    names = sorted(sizes, key=lambda name: sizes[name].element_size(), reverse=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + sizes[name].numel() * sizes[name].element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[sizes[name].dtype],
            "shape": list(sizes[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            weight = make(name)
            size = sizes[name]
            assert (weight.shape, weight.dtype) == (size.shape, size.dtype), f"{name} was announced"
            opened.write(_as_bytes(weight.contiguous()))


def _as_bytes(weight: Tensor) -> Any:
    """The memory of a tensor, of which files can be read and written."""
    return weight.reshape(-1).view(torch.uint8).numpy()


WEIGHTS_FILE = "model.safetensors"
NEEDED = ["*.json", "*.safetensors", "*.py", "*.jinja", "README.md"]
"""What a merge reads of a model on the Hub; weights that are pickled stay there."""


@dataclass(frozen=True)
class SafetensorsFolder:
    """A model's folder with safetensors files."""

    folder: Path
    places: Mapping[str, TensorLocation]
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


def open_checkpoint(source: str) -> SafetensorsFolder:
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
    places: dict[str, TensorLocation] = {}
    for path in (folder / name for name in names):
        if not path.is_file():
            raise ModelError(f"{folder} lacks {path.name}", remedy="download the model again")
        places |= find_weights(path)
    return SafetensorsFolder(folder, places)


def _model_folder(source: str) -> Path:
    folder = local_folder(source)
    if folder is not None:
        return folder
    with quiet_libraries(keep_progress=True), explain_failure(source):
        cached = only_cached(source)
        return Path(snapshot_download(source, allow_patterns=NEEDED, local_files_only=cached))
