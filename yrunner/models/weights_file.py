"""A file of weights in the form of safetensors, read and written one weight at a time.

The library of that name maps the files that it reads, whose pages are in memory beside their copy,
and writes a file from all of its weights at once. The form is simple: the length of a header, the
header in JSON, and the numbers of every weight.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from yrunner.models.failures import explain_failure

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
class Place:
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


def find_weights(file: Path) -> dict[str, Place]:
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
        name: Place(file, 8 + length + header[name]["data_offsets"][0], size)
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
