"""A model looks at data: the loss and entropy of every target, and what it would have said."""

# N = target tokens

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yrunner.data.collate import collate
from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.losses.fused import attach, measure_targets
from yrunner.losses.per_token import PLAIN, TokenWeight


@dataclass(frozen=True)
class TokenScores:
    """What a model makes of the targets of one example, in their order."""

    loss_N: Tensor
    """Cross-entropy in nats."""
    entropy_N: Tensor
    """Entropy of the prediction in nats."""
    weight_N: Tensor
    """What a loss would weigh each target with."""
    top_N: Tensor
    """Id of the likeliest token."""
    origin: Origin


def score_tokens(
    model: Any,
    examples: Sequence[TokenizedExample],
    *,
    pad_token_id: int,
    batch_size: int,
    weight: TokenWeight = PLAIN,
) -> Iterator[TokenScores]:
    """The scores of each example, in their order; examples that follow each other share a batch."""
    attach(model)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(examples), batch_size):
            yield from _score_batch(
                model, examples[start : start + batch_size], pad_token_id, weight
            )
    finally:
        model.train(was_training)


def _score_batch(
    model: Any, examples: Sequence[TokenizedExample], pad_token_id: int, weight: TokenWeight
) -> Iterator[TokenScores]:
    batch = collate(examples, pad_token_id)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with torch.no_grad():
        targets = measure_targets(model, batch, weight, wants_top=True)
    assert targets.top_N is not None
    figures = (targets.loss_N, targets.entropy_N, targets.weight_N, targets.top_N)
    sizes = [len(example.target_positions) for example in examples]
    parts = zip(*(torch.split(figure_N.cpu(), sizes) for figure_N in figures), strict=True)
    for example, (loss_N, entropy_N, weight_N, top_N) in zip(examples, parts, strict=True):
        yield TokenScores(loss_N, entropy_N, weight_N, top_N, example.origin)
