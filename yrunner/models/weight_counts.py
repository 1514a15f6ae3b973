"""How many numbers of a model are trained, frozen, multiplied with, or could be kept in 4 bits."""

from dataclasses import dataclass

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class WeightCounts:
    """Numbers, not bytes. Weights that are tied count once."""

    trained: int
    frozen: int
    trained_in_layers: int
    """Of the trained: those of linear layers but the head, which multiply every token."""
    frozen_in_layers: int
    """The same of the frozen: what 4 bits can hold."""
    head: int
    """The matrix from hidden states to logits, also where it is tied to the embeddings."""
    largest: int
    """The largest matrix of all: what ZeRO-3 gathers at once."""
    largest_in_layers: int
    """The largest frozen matrix of a linear layer: what is made of 4 bits at once."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.trained + self.frozen

    @property
    def in_layers(self) -> int:
        """What multiplies every token, trained or frozen."""
        return self.trained_in_layers + self.frozen_in_layers


def count_weights_of(model: PreTrainedModel | PeftModel) -> WeightCounts:
    """Count the weights of a model, weightless or not, that is ready to train."""
    parameters = list(model.parameters())
    head = model.get_output_embeddings()
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
