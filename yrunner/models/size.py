"""Sizes of a model from its shapes: weights by kind, and the disk space of a run."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from yrunner.losses.score_head import critic_weights
from yrunner.losses.vocabulary_layers import base_head

SMALL_FILES = 2**15
"""Approximate bytes of a checkpoint besides weights and optimizer: scheduler, random states,
arguments, log."""


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of weights, not bytes. Tied ones count once."""

    trained: int
    frozen: int
    trained_in_layers: int
    """Trained weights of linear layers without the head; they multiply every token."""
    frozen_in_layers: int
    """Frozen weights of linear layers without the head; they can be stored in 4 bits."""
    head: int
    """The output head, even if it is tied to the embeddings."""
    largest: int
    """The largest matrix; ZeRO-3 gathers it at once."""
    largest_in_layers: int
    """The largest frozen matrix of a linear layer; it is dequantized at once."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.trained + self.frozen

    @property
    def in_layers(self) -> int:
        """Weights that multiply every token, trained or frozen."""
        return self.trained_in_layers + self.frozen_in_layers


def count_weights_of(model: PreTrainedModel | PeftModel) -> WeightCounts:
    """Count the weights of a model, fake or real, that is ready to train."""
    parameters = list(model.parameters())
    head = base_head(model)
    layers = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    in_layers = {
        trained: [weight.numel() for weight in layers if weight.requires_grad == trained]
        for trained in (True, False)
    }
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return WeightCounts(
        trained=trained,
        frozen=sum(parameter.numel() for parameter in parameters) - trained,
        trained_in_layers=sum(in_layers[True]),
        frozen_in_layers=sum(in_layers[False]),
        head=0 if head is None else head.weight.numel(),
        largest=max(parameter.numel() for parameter in parameters),
        largest_in_layers=max(in_layers[False], default=0),
    )


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that a run writes."""

    checkpoint: int
    """One checkpoint: weights and optimizer state."""
    model: int
    """The final model's folder: weights and tokenizer."""


def estimate_disk(
    model: PreTrainedModel | PeftModel, optimizer_bytes: int, tokenizer: PreTrainedTokenizerBase
) -> DiskNeed:
    """What a run of `model`, fake or real, writes; `optimizer_bytes`: the optimizer state."""
    weights = saved_weight_bytes(model)
    return DiskNeed(
        checkpoint=weights + optimizer_bytes + SMALL_FILES,
        model=weights + _tokenizer_bytes(tokenizer),
    )


def saved_weight_bytes(model: PreTrainedModel | PeftModel) -> int:
    """Bytes of the saved weights: adapters of a peft model, else all; tied ones once."""
    if isinstance(model, PeftModel):
        own = get_peft_model_state_dict(model, save_embedding_layers=False).values()
        return _bytes_of([*own, *critic_weights(model).values()])
    return _bytes_of(model.state_dict().values())


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of an optimizer's state."""
    states = optimizer.state.values()
    return _bytes_of(it for state in states for it in state.values() if isinstance(it, Tensor))


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[id(storage)] = storage.nbytes()
    return sum(sizes.values())


def _tokenizer_bytes(tokenizer: PreTrainedTokenizerBase) -> int:
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
