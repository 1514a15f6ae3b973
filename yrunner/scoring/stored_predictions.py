"""A model's likeliest tokens for every target of many examples, on disk and never all in memory."""

# Shapes: N = targets, K = likeliest tokens

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yrunner.data.conversation import TokenizedExample
from yrunner.losses.kl import TopBase
from yrunner.scoring.base_predictions import cache_predictions

FILES = ("ids.bin", "logs.bin", "rest.bin")
DTYPES = (np.dtype(np.int32), np.dtype(np.float32), np.dtype(np.float32))
ROWS_AT_ONCE = 512
"""Rows in memory; batches are made of rows of similar length among them."""


def bytes_on_disk(num_targets: int, top: int) -> int:
    """Size of the files."""
    ids, logs, rest = (dtype.itemsize for dtype in DTYPES)
    return num_targets * (top * (ids + logs) + rest)


@dataclass(frozen=True)
class StoredPredictions:
    """The files of a folder, read where they are needed."""

    ids_NK: NDArray[Any]
    log_NK: NDArray[Any]
    log_rest_N: NDArray[Any]
    starts_E: NDArray[np.int64]
    """Index of the first target of each example."""

    @classmethod
    def open(cls, folder: Path, num_targets_E: NDArray[Any]) -> "StoredPredictions":
        """What `store_predictions` wrote for examples with these numbers of targets."""
        ends_E = np.asarray(num_targets_E, np.int64).cumsum()
        ids, logs, rest = (
            np.memmap(folder / name, dtype, mode="r")
            for name, dtype in zip(FILES, DTYPES, strict=True)
        )
        shape = (int(ends_E[-1]), -1)
        return cls(ids.reshape(shape), logs.reshape(shape), rest, ends_E - num_targets_E)

    def of(self, places: Iterable[Sequence[int]], device: torch.device) -> TopBase:
        """The predictions for some targets: of each example its index, the first and how many."""
        parts = [np.empty(0, np.int64)]
        for example, first, number in places:
            start = self.starts_E[example] + first
            parts.append(np.arange(start, start + number))
        chosen_N = np.concatenate(parts)

        def read(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array[chosen_N]).to(device)

        return TopBase(read(self.ids_NK).long(), read(self.log_NK), read(self.log_rest_N))

    @property
    def mean_rest(self) -> float:
        """Mean mass of the tokens not stored: half the bound on the error of the gradient."""
        return float(np.exp(self.log_rest_N, dtype=np.float64).mean())


def store_predictions(
    folder: Path,
    model: Any,
    examples: Sequence[TokenizedExample],
    *,
    advance: Callable[[int], None],
    **options: Any,
) -> None:
    """Predict every target of the examples and write FILES; options: of `cache_predictions`."""
    files = [(folder / name).open("wb") for name in FILES]
    try:
        for start in range(0, len(examples), ROWS_AT_ONCE):
            some = examples[start : start + ROWS_AT_ONCE]
            tops = cache_predictions(model, some, advance=advance, **options).tops
            for file, tensor, dtype in zip(files, vars(tops).values(), DTYPES, strict=True):
                file.write(tensor.numpy().astype(dtype).tobytes())
    finally:
        for file in files:
            file.close()
