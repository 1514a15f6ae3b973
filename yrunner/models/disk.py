"""How much disk a run needs, from the shapes of its model."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMALL_FILES = 2**15
"""Bytes of what a checkpoint holds besides weights and optimizer, about: scheduler, generators'
states, arguments, log."""


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that a run writes."""

    checkpoint: int
    """One checkpoint: the weights as Trainer saves them, and the optimizer's state."""
    model: int
    """The final model's folder: weights and tokenizer."""


def estimate_disk(
    model: PreTrainedModel | PeftModel, optimizer_bytes: int, tokenizer: PreTrainedTokenizerBase
) -> DiskNeed:
    """What a run of `model`, weightless or not, writes; `optimizer_bytes`: the optimizer state."""
    weights = saved_weight_bytes(model)
    return DiskNeed(
        checkpoint=weights + optimizer_bytes + SMALL_FILES,
        model=weights + _tokenizer_bytes(tokenizer),
    )


def saved_weight_bytes(model: PreTrainedModel | PeftModel) -> int:
    """Bytes of the weights that are saved: a peft model's adapter, else all; tied ones once."""
    if isinstance(model, PeftModel):
        return _bytes_of(get_peft_model_state_dict(model, save_embedding_layers=False).values())
    return _bytes_of(model.state_dict().values())


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of what an optimizer remembers from update to update."""
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
