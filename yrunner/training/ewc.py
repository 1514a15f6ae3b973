"""EWC: estimate the Fisher information of each weight, and penalise moving by it.

Kirkpatrick et al., 2017 (arXiv 1612.00796). On rows that the base wrote itself, the squared
gradient is an unbiased estimate of its Fisher information: then the penalty is the quadratic form
of KL(base || tuned) per token, without what lies between two weights.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from yrunner.data.batching.collate import collate
from yrunner.data.conversation import TokenizedExample
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.models.limits import evaluating
from yrunner.scoring.base_predictions import to_device
from yrunner.training.replay_loss import KeptMean, MicroBatch

Weights = dict[str, Tensor]
"""A tensor for each trained weight, by its name."""


def estimate_fisher(
    model: Any,
    examples: Sequence[TokenizedExample],
    *,
    pad_token_id: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Weights:
    """The Fisher information per token of every trained weight, its diagonal, in float32.

    A row at a time: the square of a sum over rows would be another number. Gradients are left as
    they were found: none.
    """
    attach(model)
    trained = trained_weights(model)
    found = {name: torch.zeros_like(weight) for name, weight in trained.items()}
    num_targets = 0
    with evaluating(model):
        for example in examples:
            batch = to_device(collate([example], pad_token_id), model.device)
            targets = measure_targets(model, batch)
            targets.weighted.backward()  # type: ignore[no-untyped-call]
            num_targets += len(targets.loss_N)
            for name, weight in trained.items():
                if weight.grad is not None:
                    found[name].addcmul_(weight.grad, weight.grad)
            model.zero_grad(set_to_none=True)
            advance(1)
    return {name: total.div_(max(1, num_targets)) for name, total in found.items()}


def trained_weights(model: Any) -> Weights:
    """The weights that are trained, by their names in the model."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def save_fisher(fisher: Weights, path: Path) -> None:
    """Write a file for `load_fisher`, atomically."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous().cpu() for name, tensor in fisher.items()}, partial)
    partial.rename(path)


def load_fisher(path: Path, model: Any) -> Weights:
    """Read what `save_fisher` wrote, to where the model is."""
    return {name: tensor.to(model.device) for name, tensor in load_file(path).items()}


class EwcPenalty:
    """Half the strength times the sum of Fisher times (weight - start)^2, once in each update."""

    runs_model = False

    def __init__(self, model: Any, fisher: Weights, strength: float) -> None:
        """`model` as training starts: its weights now are the anchor."""
        self.weights = trained_weights(model)
        assert self.weights.keys() == fisher.keys(), "the Fisher information of other weights"
        self.start = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.fisher = fisher
        self.strength = strength
        self.mean = KeptMean()

    def loss(self, model: Any, called: Any, micro: MicroBatch) -> Tensor | None:
        """See `Regulariser`."""
        if micro.number >= micro.at_once:
            return None
        # DeepSpeed rounds the weights that it computes with; their start is rounded alike.
        moved = {
            name: (weight - self.start[name].to(weight.dtype)).float()
            for name, weight in self.weights.items()
        }
        parts = [(self.fisher[name] * distance.square()).sum() for name, distance in moved.items()]
        penalty = torch.stack(parts).sum() / 2
        self.mean.add(penalty, 1)
        # Each rank has a part: sum over ranks.
        return self.strength * penalty / micro.at_once

    @property
    def logged_as(self) -> str:
        """The mean penalty of an update, without its strength."""
        return "keep_penalty"
