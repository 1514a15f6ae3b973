"""What the passes through a plain linear head share: inputs cast once, gradients that add up."""

# N = targets, D = hidden size, V = vocabulary

from typing import Any

import torch
from torch import Tensor

HeadInputs = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states of the targets [N, D], the head's weight [V, D], and its bias [V] if it has one."""


class HeadWork:
    """Works through a head chunk by chunk, in the precision of the computation."""

    def __init__(self, inputs: HeadInputs, needed: list[bool]) -> None:
        """`needed`: which of the inputs want a gradient."""
        self.hidden_ND, weight_VD, bias_V = inputs
        self.dtype = weight_VD.dtype
        device = self.hidden_ND.device.type
        if torch.is_autocast_enabled(device):
            self.dtype = torch.get_autocast_dtype(device)
        # Cast once, by hand: autocast would cast a frozen head again for every chunk.
        self.head_VD = weight_VD.to(self.dtype)
        self.head_V = None if bias_V is None else bias_V.to(self.dtype)
        self.wide = torch.promote_types(self.dtype, torch.float32)
        """In which losses are told and the head's gradients are summed."""
        self.gradients = [
            torch.zeros_like(tensor, dtype=self.wide if place else None)
            if need and tensor is not None
            else None
            for place, (tensor, need) in enumerate(zip(inputs, needed, strict=True))
        ]
        self._dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]

    def hand_over(self, ctx: Any) -> None:
        """Keep the gradients for the backward pass, see `scale_gradients`."""
        ctx.gradients, ctx.dtypes = self.gradients, self._dtypes


def scale_gradients(ctx: Any, gradient: Tensor) -> list[Tensor | None]:
    """The gradients of the inputs, times that of the loss. They are given away, so only once."""
    gradients, ctx.gradients = ctx.gradients, None
    assert gradients is not None, "the gradient of a fused head can be taken once"
    return [
        None if tensor is None else tensor.mul_(gradient).to(dtype)
        for tensor, dtype in zip(gradients, ctx.dtypes, strict=True)
    ]
