"""A computation of ours inside one call of the head, so that all its weights are there.

ZeRO-3 splits every weight over the ranks and gathers it while the module that owns it runs. One
call per batch, whatever the number of chunks: ranks with unequal numbers of targets would otherwise
wait for each other for ever.

What the passes through a plain linear head share: inputs cast once, gradients that add up.

Memory for the logits of a chunk that is kept from batch to batch.
"""

# N = targets, D = hidden size

# N = targets, D = hidden size, V = vocabulary

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled


def call_head(
    head: nn.Module, compute: Callable[[Tensor], tuple[Tensor, ...]], hidden_ND: Tensor
) -> Any:
    """What `compute` makes of the hidden states, called as the forward of `head`."""
    with replaced_forward(head, compute):
        return head(hidden_ND)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let calls of `module` run `forward`; what is hooked to them happens as ever."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def gather_as_one(head: nn.Module | None) -> None:
    """Let ZeRO-3 gather the parts of a head, such as LoRA's, with the head itself.

    Otherwise they would be split again before the backward pass has used them. Takes effect where
    it comes before `deepspeed.initialize`.
    """
    if head is None or not any(True for _ in head.children()) or not is_deepspeed_zero3_enabled():
        return
    from deepspeed.utils import set_z3_leaf_module

    set_z3_leaf_module(head, True)


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


class Space:
    """Matrices that are used again: on a processor the pages of new memory have to be brought in.

    That takes longer than a pass over it. On a GPU torch keeps memory itself, and nothing is kept
    here.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A matrix of any content; what was taken under this name before is used up."""
        size = shape[0] * shape[1]
        kept = self.kept.get(name)
        if kept is None or kept.dtype != dtype or kept.numel() < size:
            # Let go of the old one first.
            self.kept.pop(name, None)
            kept = like.new_empty(size, dtype=dtype)
            if kept.device.type == "cpu":
                self.kept[name] = kept
        return kept[:size].view(shape)
