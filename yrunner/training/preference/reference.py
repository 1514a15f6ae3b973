"""The reference of a preference run: what the model made of every answer as the run began."""

# Shapes: R = rows, A = answers of a row, S = answers

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from yrunner.data.batching.answers import ANSWERS_OF_A_ROW, ComparedRows, collate_with_owners
from yrunner.data.batching.packing import batches_by_length
from yrunner.data.conversation import TokenizedExample
from yrunner.losses.fused_head import attach
from yrunner.models.limits import evaluating
from yrunner.scoring.base_predictions import to_device
from yrunner.training.preference.answers import log_probs_of_answers

FILE = "reference.safetensors"
ROWS_AT_ONCE = 512
"""Rows in memory; batches are made of answers of similar length among them."""


@dataclass(frozen=True)
class Reference:
    """Log-probabilities of all answers in nats, float64, as `ComparedRows` yields them."""

    train_RA: Tensor
    validation_RA: Tensor

    def save(self, folder: Path) -> None:
        """Write FILE into a folder."""
        save_file(dict(vars(self)), folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> "Reference":
        """Read what `save` wrote."""
        return cls(**load_file(folder / FILE))


def measure_reference(
    model: Any,
    rows: ComparedRows,
    *,
    pad_token_id: int,
    max_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Log-probabilities of every answer under `model`, shape [R, A]; at most `max_tokens` at once.

    `model`: as the run begins, on its device.
    """
    attach(model)
    parts = [torch.empty(0, dtype=torch.float64)]
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(rows), ROWS_AT_ONCE):
            numbers = range(start, min(len(rows), start + ROWS_AT_ONCE))
            answers = rows.every_answer(numbers)
            parts.append(_log_probs(model, answers, pad_token_id, max_tokens))
            advance(len(numbers))
    return torch.cat(parts).view(-1, ANSWERS_OF_A_ROW)


def _log_probs(model: Any, answers: list[TokenizedExample], pad: int, max_tokens: int) -> Tensor:
    found_S = torch.empty(len(answers), dtype=torch.float64)
    for places in batches_by_length([len(each.input_ids) for each in answers], max_tokens):
        batch = to_device(collate_with_owners([answers[at] for at in places], pad), model.device)
        found_S[places] = log_probs_of_answers(model, batch)[0].cpu()
    return found_S
