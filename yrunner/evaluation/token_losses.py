"""The loss of every target of some examples: what the NLIRG curve will see of them."""

from collections.abc import Sequence
from typing import Any

import torch

from yrunner.data.collate import collate
from yrunner.data.conversation import TokenizedExample
from yrunner.losses.per_token import predicting_columns, target_losses


def measure_token_losses(
    model: Any, examples: Sequence[TokenizedExample], *, pad_token_id: int, batch_size: int
) -> list[float]:
    """Loss in nats of every target, example by example."""
    was_training = model.training
    model.eval()
    losses: list[float] = []
    with torch.no_grad():
        for start in range(0, len(examples), batch_size):
            batch = collate(examples[start : start + batch_size], pad_token_id)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels_BT = batch.pop("labels")
            columns_K = predicting_columns(labels_BT)
            logits_BKV = model(**batch, logits_to_keep=columns_K, use_cache=False).logits
            losses += target_losses(logits_BKV, labels_BT, columns_K).tolist()
    model.train(was_training)
    return losses
