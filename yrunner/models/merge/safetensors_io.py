"""Read and write safetensors files one weight at a time: a model may exceed memory.

The safetensors library maps files that it reads, so their pages are in memory next to their copy,
and needs all weights at once to write a file. The format is simple: length of the header, header in
JSON, data of every weight.
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
from yrunner.models.errors import (
    INDEX_FILE,
    WEIGHTS_FILE,
    explain_failure,
    silence_libraries,
)
from yrunner.models.hub import only_cached
from yrunner.models.load import check_folder
from yrunner.models.local import DTYPE_NAMES, local_folder
from yrunner.models.quantization import (
    dequantize_weight,
    quantized_parts,
    stored_quantization,
)

NEEDED = ["*.json", "*.safetensors", "*.py", "*.jinja", "README.md"]
"""Files that a merge downloads from the Hub; no pickled weights."""
STRETCH = 2**22
"""Numbers read at once."""


@dataclass(frozen=True)
class TensorLocation:
    """Location of a weight."""

    file: Path
    start: int
    """Offset of its first byte in the file."""
    size: Tensor
    """Its shape and dtype, as a meta tensor."""

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Read the weight to the CPU and convert it; it is never in memory in both dtypes."""
        weight = torch.empty(self.size.shape, dtype=dtype or self.size.dtype)
        raw = torch.empty(min(STRETCH, self.size.numel()), dtype=self.size.dtype)
        with self.file.open("rb") as file:
            file.seek(self.start)
            for part in torch.split(weight.view(-1), STRETCH):
                file.readinto(_as_bytes(raw[: len(part)]))
                part.copy_(raw[: len(part)])
        return weight


@dataclass(frozen=True)
class QuantizedLocation:
    """Location of a weight that bitsandbytes has quantized, with that of its scales."""

    parts: Mapping[str, TensorLocation]
    """As `quantized_parts` names them."""
    size: Tensor
    """Shape and dtype of the dequantized weight, as a meta tensor."""

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Read and dequantize the weight on the CPU, as a forward pass would, and convert it."""
        parts = {name: location.read() for name, location in self.parts.items()}
        return dequantize_weight(parts, self.size.dtype).to(dtype)


Location = TensorLocation | QuantizedLocation


@dataclass(frozen=True)
class SafetensorsFolder:
    """A model's folder with safetensors files. Quantized weights are read dequantized."""

    folder: Path
    locations: Mapping[str, Location]
    """By the name of the weight."""

    @property
    def sizes(self) -> dict[str, Tensor]:
        """Shape and dtype of every weight, as meta tensors."""
        return {name: location.size for name, location in self.locations.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one weight to the CPU, in its dtype or another."""
        return self.locations[name].read(dtype)

    def main_dtype(self) -> torch.dtype:
        """The dtype of most of the numbers."""
        numbers: Counter[torch.dtype] = Counter()
        for weight in self.sizes.values():
            numbers[weight.dtype] += weight.numel()
        return numbers.most_common(1)[0][0]


def open_checkpoint(source: str) -> SafetensorsFolder:
    """The checkpoint of a folder or a Hub id, downloaded if necessary. Reads only headers.

    Raises `ModelError` for a source without complete safetensors files.
    """
    folder = _model_folder(source)
    check_folder(folder)
    index = folder / INDEX_FILE
    if index.is_file():
        with explain_failure(str(index)):
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    else:
        names = [WEIGHTS_FILE]
    locations: dict[str, TensorLocation] = {}
    for path in (folder / name for name in names):
        if not path.is_file():
            raise ModelError(f"{folder} lacks {path.name}", remedy="download the model again")
        locations |= locate_weights(path)
    if stored_quantization(str(folder)) is None:
        return SafetensorsFolder(folder, locations)
    return SafetensorsFolder(folder, _join_quantized(folder, locations))


def _join_quantized(folder: Path, locations: Mapping[str, TensorLocation]) -> dict[str, Location]:
    """The locations of a bitsandbytes checkpoint, scales joined to the weights that they scale."""
    quantized = quantized_parts(locations.keys())
    if not quantized:
        raise ModelError(
            f"{folder / 'config.json'} says that the weights are quantized, but they are not",
            remedy="remove quantization_config from it",
        )
    within = {name for parts in quantized.values() for name in parts.values()}
    joined: dict[str, Location] = {
        name: location for name, location in locations.items() if name not in within
    }
    # In 8 bits nothing says what the dtype was; it is that of most other weights.
    dtype = SafetensorsFolder(Path(), joined).main_dtype()
    for weight, names in quantized.items():
        parts = {part: locations[name] for part, name in names.items()}
        joined[weight] = QuantizedLocation(parts, _dequantized_size(parts, dtype))
    return joined


def _dequantized_size(parts: Mapping[str, TensorLocation], dtype: torch.dtype) -> Tensor:
    for part, location in parts.items():
        if part.startswith("quant_state."):
            state = json.loads(bytes(location.read().numpy()))
            return torch.empty(state["shape"], dtype=getattr(torch, state["dtype"]), device="meta")
    return parts[""].size.to(dtype)


def _model_folder(source: str) -> Path:
    folder = local_folder(source)
    if folder is not None:
        return folder
    with silence_libraries(keep_progress=True), explain_failure(source):
        cached = only_cached(source)
        return Path(snapshot_download(source, allow_patterns=NEEDED, local_files_only=cached))


def locate_weights(file: Path) -> dict[str, TensorLocation]:
    """The location of every weight in a file, by name. Reads only the header.

    Raises `ModelError` for a damaged file.
    """
    with explain_failure(str(file)), safe_open(file, framework="pt") as weights:
        # The file is mapped; none of its pages are read for this.
        sizes = {name: weights.get_tensor(name).to("meta") for name in weights.keys()}
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {
        name: TensorLocation(file, 8 + length + header[name]["data_offsets"][0], size)
        for name, size in sizes.items()
    }


def write_weights(file: Path, sizes: Mapping[str, Tensor], make: Callable[[str], Tensor]) -> None:
    """Write weights of these shapes and dtypes; `make` computes them by name, one at a time."""
    # Wider dtypes first, so that all data are aligned.
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
            expected = (sizes[name].shape, sizes[name].dtype)
            assert (weight.shape, weight.dtype) == expected, f"{name} has another size"
            opened.write(_as_bytes(weight.contiguous()))


def _as_bytes(weight: Tensor) -> Any:
    """The memory of a tensor as a buffer to read and write files."""
    return weight.reshape(-1).view(torch.uint8).numpy()
