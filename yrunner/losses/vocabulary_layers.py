"""Embeddings and output head of a model, beneath or with whatever peft has wrapped around them."""

from typing import Any

from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
)
from torch import nn


def own_layer(module: Any) -> Any:
    """The layer of the base beneath adapters, trained copies and trained tokens."""
    while True:
        if isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        elif isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        else:
            return module


def base_embeddings(model: Any) -> Any:
    """The base's own embeddings."""
    return own_layer(model.get_input_embeddings())


def base_head(model: Any) -> Any:
    """The base's own output head; None for a model without one."""
    return own_layer(model.get_output_embeddings())


def active_head(model: Any) -> Any:
    """The module that computes logits; for a head in `modules_to_save`, the trained copy."""
    head = model.get_output_embeddings()
    if not isinstance(head, ModulesToSaveWrapper):
        return head
    active = head.active_adapters
    if head.disable_adapters or not active or active[0] not in head.modules_to_save:
        return head.original_module
    return head.modules_to_save[active[0]]


def is_tied(model: Any) -> bool:
    """Whether the base's embeddings and output head are one weight."""
    head = base_head(model)
    return head is not None and head.weight is base_embeddings(model).weight


def is_plain(head: Any) -> bool:
    """Whether weight and bias are all there is. Accelerate's hooks load weights from elsewhere."""
    return type(head) is nn.Linear and not hasattr(head, "_hf_hook")


def trains_row(layer: Any, token_id: int) -> bool:
    """Whether training can change a row of embeddings or head, as `model` returns that layer."""
    if isinstance(layer, TrainableTokensWrapper):
        layer = layer.token_adapter
    if isinstance(layer, TrainableTokensLayer):
        return any(token_id in layer.token_indices[name] for name in layer.active_adapters)
    return any(weight.requires_grad for weight in layer.parameters())


def count_embeddings(model: Any) -> int:
    """Ids that have an embedding; right under ZeRO-3 too, where the weight itself is empty."""
    return int(base_embeddings(model).num_embeddings)
