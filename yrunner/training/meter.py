"""Sums over the targets of some updates, and the figures that are logged of them."""

import time
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers.trainer_callback import ExportableState

from yrunner.losses.nlirg import ZONES

GIB = 2**30


class SignalMeter(ExportableState):
    """Adds up the records of `sum_targets` between two logs, without waiting for the device."""

    def __init__(self) -> None:
        self._sums_R: Tensor | None = None
        self._seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Start the clock, if it does not run already."""
        if self._started is None:
            self._started = time.perf_counter()

    def add(self, record_R: Tensor) -> None:
        """Add the record of one micro-step."""
        if self._sums_R is None:
            self._sums_R = record_R
        else:
            self._sums_R = self._sums_R.to(record_R.device) + record_R

    def drain(self) -> dict[str, float]:
        """The figures of everything added since the last call, under their names in metrics.jsonl.

        See `figures_of`; besides, the speed and the memory.
        """
        assert self._sums_R is not None, "nothing was added"
        figures = figures_of(self._sums_R.tolist())
        # tolist() waited for the device, so the clock now covers all the work.
        seconds = self._so_far()
        self._sums_R, self._seconds, self._started = None, 0.0, None
        return {
            **figures,
            "targets_per_second": figures["targets"] / seconds if seconds else 0.0,
            "memory_gib": peak_memory() / GIB,
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint between two logs keeps."""
        return {"args": {}, "attributes": {"pending": self.pending}}

    @property
    def pending(self) -> dict[str, Any] | None:
        """Sums and seconds that no record has yet; None when there are none."""
        if self._sums_R is None:
            return None
        return {"sums": self._sums_R.tolist(), "seconds": self._so_far()}

    @pending.setter
    def pending(self, pending: dict[str, Any] | None) -> None:
        if pending is not None:
            self._sums_R = torch.tensor(pending["sums"], dtype=torch.float64)
            self._seconds = pending["seconds"]

    def _so_far(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds + running


def figures_of(sums: Sequence[float]) -> dict[str, float]:
    """The figures of summed records of `sum_targets`, under their names in metrics.jsonl.

    Losses, weight, entropy and accuracy (top-1) are per target; `refused` (weight 0) and the
    zones are shares of the targets; `gradient_` is each zone's share of what the targets pull
    at their logits.
    """
    loss, weighted, weights, entropy, hits, refused, *by_zone, targets = sums
    zones, pulls = by_zone[: len(ZONES)], by_zone[len(ZONES) :]
    all_targets, all_pulls = max(targets, 1), sum(pulls) or 1.0
    return {
        "loss": loss / all_targets,
        "weighted_loss": weighted / all_targets,
        "mean_weight": weights / all_targets,
        "entropy": entropy / all_targets,
        "accuracy": hits / all_targets,
        "refused": refused / all_targets,
        **{f"zone_{name}": n / all_targets for name, n in zip(ZONES, zones, strict=True)},
        **{f"gradient_{name}": n / all_pulls for name, n in zip(ZONES, pulls, strict=True)},
        "targets": int(targets),
    }


def peak_memory() -> int:
    """Bytes: the most the GPU had allocated, or, without one, what the process holds now."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)
