"""A computation of ours inside one call of the head, so that all its weights are there.

ZeRO-3 splits every weight over the ranks and gathers it while the module that owns it runs. One
call per batch, whatever the number of chunks: ranks with unequal numbers of targets would otherwise
wait for each other for ever.
"""

# N = targets, D = hidden size

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
