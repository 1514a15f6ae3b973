"""A few answers of each logged update, token by token: the ratios that it learned with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from yrunner.data.batching.batches import Batch
from yrunner.storage.run_dir import write_text
from yrunner.training.rl.batches import RolloutRows

ANSWERS, TOKENS = 4, 256
"""Answers of an update that are kept, and tokens of each: some 20 kB for a line of the log."""


class TokenSamples(TrainerCallback):
    """Writes rollout_tokens.jsonl: a line for each answer.

    Log-probabilities belong to the weights of that update, and cannot be computed afterwards.
    """

    def __init__(self, path: Path, rows: RolloutRows) -> None:
        self.path = path
        self.rows = rows
        self._chosen: set[int] = set()
        self._found: list[dict[str, Any]] = []

    def begin(self, batches: Sequence[Batch]) -> None:
        """Choose from the answers of this process's next update, evenly."""
        numbers = [number for batch in batches for number in batch["number_S"].tolist()]
        places = torch.linspace(0, len(numbers) - 1, min(ANSWERS, len(numbers))).long().tolist()
        self._chosen = {numbers[place] for place in places}
        self._found = []

    def add(
        self, batch: Batch, log_prob_N: Tensor, log_ratio_N: Tensor, is_clipped_N: Tensor
    ) -> None:
        """Look at a micro-batch, as the loss sees it."""
        for at, number in enumerate(batch["number_S"].tolist()):
            if number not in self._chosen:
                continue
            is_own_N = batch["answer_N"] == at
            clipped = is_clipped_N[is_own_N].nonzero().flatten().tolist()
            rollout, cycle = self.rows.buffer.by_number[number], self.rows.buffer.cycle
            origin = self.rows.prompt(number).origin
            self._found.append(
                {
                    "cycle": cycle,
                    "file": origin.file.name,
                    "row": origin.row,
                    "generation": number % self.rows.generations,
                    "ids": rollout.ids[:TOKENS],
                    "log_prob": _short(log_prob_N[is_own_N]),
                    "ratio": _short(log_ratio_N[is_own_N].exp()),
                    "clipped": [place for place in clipped if place < TOKENS],
                }
            )

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Forget the updates after the checkpoint that a resumed run starts from."""
        if not state.is_world_process_zero:
            return
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= state.global_step]
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Append the answers of the update that a record of the training ends with."""
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        lines = [json.dumps({"step": state.global_step, **each}) for each in self._found]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))


def _short(values_N: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values_N.detach()[:TOKENS].tolist()]


def _step_of(line: str) -> float:
    """The update of a line; beyond all others for one that a kill has cut off."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")
