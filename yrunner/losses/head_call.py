"""Run a chunked computation inside one call of the output head.

ZeRO-3 shards every weight and gathers it while the module that owns it runs. One call per batch,
whatever the number of chunks: ranks with different numbers of targets would otherwise deadlock.
"""

# N = targets, D = hidden size, V = vocabulary

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations import is_deepspeed_zero3_enabled

HeadInputs = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states of the targets [N, D], the head's weight [V, D], and its bias [V] if it has one."""


def call_head(
    head: nn.Module, compute: Callable[[Tensor], tuple[Tensor, ...]], hidden_ND: Tensor
) -> Any:
    """Call `head` with `compute` as its forward; hooks on the head run as usual."""
    with replaced_forward(head, compute):
        return head(hidden_ND)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the module's forward; its hooks stay."""
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
    """Let ZeRO-3 gather the parts of a head, such as LoRA's, together with the head.

    Otherwise they would be released before the backward pass has used them. Call it before
    `deepspeed.initialize`.
    """
    if head is None or not any(True for _ in head.children()) or not is_deepspeed_zero3_enabled():
        return
    from deepspeed.utils import set_z3_leaf_module

    set_z3_leaf_module(head, True)


def even_rows(num_targets: int, rows: int) -> int:
    """Targets per chunk, at most `rows`, with as few and as even chunks as possible."""
    num_chunks = -(-num_targets // rows)
    return -(-num_targets // max(1, num_chunks)) or rows


def chunk_slices(num_targets: int, rows: int) -> Iterator[slice]:
    """The chunks of `rows` targets."""
    return (slice(start, start + rows) for start in range(0, num_targets, rows))


class ChunkAccumulator(ABC):
    """Figures and gradients of a plain linear head, filled chunk by chunk.

    Computes in autocast's dtype, if there is one; accumulates in float32 or wider.
    """

    def __init__(self, inputs: HeadInputs, needs_gradient: list[bool]) -> None:
        """`needs_gradient`: for each of the inputs."""
        self.hidden_ND, weight_VD, bias_V = inputs
        self.dtype = weight_VD.dtype
        device = self.hidden_ND.device.type
        if torch.is_autocast_enabled(device):
            self.dtype = torch.get_autocast_dtype(device)
        # Cast once, by hand: autocast would cast a frozen head again for every chunk.
        self.head_VD = weight_VD.to(self.dtype)
        self.head_V = None if bias_V is None else bias_V.to(self.dtype)
        self.sum_dtype = torch.promote_types(self.dtype, torch.float32)
        """Of the losses and of the sums of the head's gradients."""
        self.gradients = [
            torch.zeros_like(tensor, dtype=self.sum_dtype if index else None)
            if needed and tensor is not None
            else None
            for index, (tensor, needed) in enumerate(zip(inputs, needs_gradient, strict=True))
        ]
        self.input_dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]

    @abstractmethod
    def add(self, chunk: slice) -> None:
        """Compute one chunk and add it to figures and gradients."""

    @abstractmethod
    def results(self) -> tuple[Tensor, ...]:
        """The sum to differentiate, then the figures of all targets."""


def call_linear_head(
    head: nn.Module,
    hidden_ND: Tensor,
    accumulator: Callable[[HeadInputs, list[bool]], ChunkAccumulator],
    rows: int,
) -> Any:
    """Run a plain linear head chunk by chunk; gradients are computed in the same pass."""
    # Asked here: inside an autograd function gradients are always disabled.
    wants_gradient = torch.is_grad_enabled()

    def run(hidden_ND: Tensor) -> Any:
        call = (hidden_ND, head.weight, head.bias, accumulator, rows, wants_gradient)
        return _LinearHead.apply(*call)  # type: ignore[no-untyped-call]

    return call_head(head, run, hidden_ND)


class _LinearHead(torch.autograd.Function):
    """`forward` computes the gradients too; `backward` only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        accumulator: Callable[[HeadInputs, list[bool]], ChunkAccumulator],
        rows: int,
        wants_gradient: bool,
    ) -> tuple[Tensor, ...]:
        needs_gradient = [wants_gradient and needed for needed in ctx.needs_input_grad[:3]]
        work = accumulator((hidden_ND, weight_VD, bias_V), needs_gradient)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for chunk in chunk_slices(len(hidden_ND), rows):
                work.add(chunk)
        ctx.gradients, ctx.dtypes = work.gradients, work.input_dtypes
        total, *figures = work.results()
        ctx.mark_non_differentiable(*figures)
        return total, *figures

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradients are scaled in place, so only once"
        scaled = [
            None if tensor is None else tensor.mul_(gradient).to(dtype)
            for tensor, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


def call_checkpointed_head(
    head: nn.Module,
    hidden_ND: Tensor,
    run_chunk: Callable[[Tensor, slice], Any],
    join: Callable[[list[Any]], tuple[Tensor, ...]],
    rows: int,
) -> Any:
    """Run any head chunk by chunk; the backward pass computes each chunk again."""

    def run(hidden_ND: Tensor) -> tuple[Tensor, ...]:
        # Without a target the head still has to run: every trained weight gets a gradient, of zero.
        return join(
            [
                checkpoint(run_chunk, hidden_ND[chunk], chunk, use_reentrant=False)
                for chunk in chunk_slices(max(1, len(hidden_ND)), rows)
            ]
        )

    if torch.is_grad_enabled() and not hidden_ND.requires_grad:
        # If only the head is trained, ZeRO-3 knows by this gradient when the head is done.
        hidden_ND = hidden_ND.detach().requires_grad_()
    return call_head(head, run, hidden_ND)
