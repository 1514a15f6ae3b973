"""Compute the products of a model that only looks or writes in bfloat16, all else in float32.

A processor with instructions for bfloat16 multiplies it about twice as fast, and writing, which
reads all weights for each token, reads half as many bytes. The sum that runs through the layers,
norms, attention, logits and what follows from them stay in float32: rounded to 8 bits, many likely
tokens would tie, and attention in bfloat16 takes longer on a CPU.
"""

# T = tokens, D = input features, F = output features

from typing import Any

import torch
from torch import Tensor, bfloat16, float32, nn
from transformers import PreTrainedModel

DESCRIPTION = "float32 with products in bfloat16"
"""In place of a dtype, where results of other precisions must be told apart."""
USUAL_ROWS = 16
"""Rows of an input for which weights are laid out; others take hardly longer."""


class HalfLinear(nn.Module):
    """A frozen linear layer with weights in bfloat16; inputs, outputs and bias in float32."""

    weight: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight_FD = layer.weight.detach().to(bfloat16)
        self.is_laid_out = lays_out()
        if self.is_laid_out:
            weight_FD = torch.ops.mkldnn._reorder_linear_weight(weight_FD, USUAL_ROWS)
        self.register_buffer("weight", weight_FD)
        self.bias = layer.bias
        self.train(layer.training)

    def forward(self, x_TD: Tensor) -> Tensor:
        """The output, of shape [..., F], for inputs of shape [..., D]. Without a gradient."""
        x_TD = x_TD.to(bfloat16)
        output_TF: Tensor
        if self.is_laid_out:
            multiply: Any = torch.ops.mkldnn._linear_pointwise
            output_TF = multiply(x_TD, self.weight, None, "none", [], "").float()
        else:
            output_TF = nn.functional.linear(x_TD, self.weight).float()
        return output_TF if self.bias is None else output_TF.add_(self.bias)


def lays_out() -> bool:
    """Whether a weight is laid out once as this CPU multiplies it, as torch.compile does it.

    Otherwise oneDNN does so at each call, which takes as long as a product with a few rows.
    """
    onednn: Any = torch.backends.mkldnn
    return bool(onednn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def halve_products(model: PreTrainedModel) -> None:
    """Put a `HalfLinear` in place of every linear layer in float32 but the output head."""
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and layer is not head and layer.weight.dtype is float32:
                setattr(parent, name, HalfLinear(layer))
