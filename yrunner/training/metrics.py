"""Sums over the targets of some updates, the metrics logged from them, and metrics.jsonl."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from yrunner.distributed.collectives import max_over_ranks, sum_over_ranks
from yrunner.losses.nlirg import ZONES
from yrunner.machine import peak_memory
from yrunner.storage.run_dir import write_text

GIB = 2**30

Figures = dict[str, float]
"""What is logged, under its names in metrics.jsonl; `loss` and `targets` among it."""


class SignalMeter:
    """Adds up the records of micro-steps between two logs, without waiting for the device."""

    def __init__(self, figures_of: Callable[[Sequence[float]], Figures] | None = None) -> None:
        """`figures_of`: from summed records to figures; None: those of `sum_targets`."""
        self.figures_of = figures_of or figures_of_targets
        self._sums_R: Tensor | None = None
        self._seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Start the clock if it is not running."""
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

        See `figures_of_targets`; besides, the speed and the memory. All of it is of all processes,
        which have to call this together.
        """
        assert self._sums_R is not None, "nothing was added"
        figures = self.figures_of(sum_over_ranks(self._sums_R).tolist())
        # tolist() waited for the device, so the clock now covers all the work.
        seconds = self._so_far()
        self._sums_R, self._seconds, self._started = None, 0.0, None
        return {
            **figures,
            "targets_per_second": figures["targets"] / seconds if seconds else 0.0,
            "memory_gib": max_over_ranks(_peak_memory()) / GIB,
        }

    def state_dict(self) -> dict[str, Any]:
        """Sums and seconds that no record has yet."""
        sums = None if self._sums_R is None else self._sums_R.tolist()
        return {"sums": sums, "seconds": self._so_far()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state["sums"] is not None:
            self._sums_R = torch.tensor(state["sums"], dtype=torch.float64)
            self._seconds = state["seconds"]

    def _so_far(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds + running


def figures_of_targets(sums: Sequence[float]) -> Figures:
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


def _peak_memory() -> int:
    """Peak bytes allocated on the GPU; without one, those of this process."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else peak_memory()


Record = dict[str, Any]


class MetricsFile(TrainerCallback):
    """Appends every record that the loop logs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Forget the records after the checkpoint that a resumed run starts from."""
        if not state.is_world_process_zero:
            return
        kept = [record for record in read_metrics(self.path) if record["step"] <= state.global_step]
        write_text(self.path, "".join(_line(record) for record in kept))

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Append one record."""
        if not state.is_world_process_zero:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line({"step": state.global_step, **(logs or {})}))


def read_metrics(path: Path) -> list[Record]:
    """The records of a run, in order; none if it has not logged yet.

    The last line may have been cut off by a kill; it belongs to no checkpoint and is passed over.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def validation_losses(records: Sequence[Record]) -> dict[int, float]:
    """Every finite validation loss, by the update after which it was measured."""
    return {
        int(row["step"]): float(row["eval_loss"])
        for row in records
        if math.isfinite(row.get("eval_loss", math.inf))
    }


def best_step(records: Sequence[Record]) -> int | None:
    """The update with the lowest validation loss, the earliest of equals; None without any."""
    losses = validation_losses(records)
    return min(losses, key=lambda step: (losses[step], step), default=None)
