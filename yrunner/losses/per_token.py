"""The loss of each target token, and the sums that one update is made of.

This is the only place where labels are shifted against logits.
"""

# B = examples, T = tokens, K = columns that are predicted from, V = vocabulary, N = targets

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from yrunner.losses.nlirg import HARD_UP_TO, count_zones
from yrunner.tokens import IGNORE_INDEX

TokenWeight = Callable[[Tensor], Tensor]
"""The weight of each target from its loss: shape [N] to shape [N]."""


def predicting_columns(labels_BT: Tensor) -> Tensor:
    """Columns whose logits predict a target in any row, shape [K]: one before each target's own.

    Given to a model as `logits_to_keep`, no logits are made for anything else.
    """
    return (labels_BT[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)


def target_losses(logits_BKV: Tensor, labels_BT: Tensor, columns_K: Tensor) -> Tensor:
    """Cross-entropy of every target in nats, shape [N], row by row; in float32 at the least."""
    labels_BK = labels_BT[:, columns_K + 1]
    is_target_BK = labels_BK != IGNORE_INDEX
    logits_NV = logits_BKV[is_target_BK]
    if logits_NV.dtype in (torch.float16, torch.bfloat16):
        logits_NV = logits_NV.float()
    return cross_entropy(logits_NV, labels_BK[is_target_BK], reduction="none")


def model_losses(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Loss of every target of a batch as `collate` makes it, in nats, shape [N], row by row."""
    labels_BT = inputs["labels"]
    columns_K = predicting_columns(labels_BT)
    others = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    logits_BKV = model(**others, logits_to_keep=columns_K, use_cache=False).logits
    return target_losses(logits_BKV, labels_BT, columns_K)


def plain_weight(loss_N: Tensor) -> Tensor:
    """Every target counts alike."""
    return torch.ones_like(loss_N)


@dataclass(frozen=True)
class LossSums:
    """Sums over targets: added up over micro-steps, divided once, for the whole step."""

    weighted: Tensor
    """Sum of weight times loss, with the gradient."""
    record_R: Tensor
    """Detached, float64, shape [8]: the sums of loss, of weight times loss and of weights, the
    targets in each of the four zones, and all targets."""


def sum_losses(loss_N: Tensor, weight: TokenWeight, loss_deadline: float = HARD_UP_TO) -> LossSums:
    """Weigh each target's gradient by `weight(loss)` and sum up."""
    known_N = loss_N.detach()
    weight_N = weight(known_N)
    # A refused token must not pass an infinite loss on: 0 times infinity is not a number.
    weighted_N = torch.where(weight_N > 0, weight_N * loss_N, torch.zeros_like(loss_N))
    sums = [terms_N.double().sum() for terms_N in (known_N, weighted_N.detach(), weight_N)]
    zones = count_zones(known_N, loss_deadline).double()
    targets = torch.tensor([float(len(known_N))], dtype=torch.float64, device=loss_N.device)
    return LossSums(weighted_N.sum(), torch.cat([torch.stack(sums), zones, targets]))
