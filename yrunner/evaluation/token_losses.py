"""The loss of every target of some examples: what the NLIRG curve will see of them."""

from collections.abc import Sequence
from typing import Any

import torch

from yrunner.data.collate import collate
from yrunner.data.conversation import TokenizedExample
from yrunner.losses.fused import attach, measure_targets


def measure_token_losses(
    model: Any, examples: Sequence[TokenizedExample], *, pad_token_id: int, batch_size: int
) -> list[float]:
    """Loss in nats of every target, example by example."""
    attach(model)
    was_training = model.training
    model.eval()
    losses: list[float] = []
    with torch.no_grad():
        for start in range(0, len(examples), batch_size):
            batch = collate(examples[start : start + batch_size], pad_token_id)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            losses += measure_targets(model, batch).loss_N.tolist()
    model.train(was_training)
    return losses
