"""The divergence of a model from its base, through the fused head: no two full arrays of logits.

A plain linear head: the gradient is computed in the same pass as the divergence. Any other head
(LoRA on it, quantized): each chunk is computed once more in the backward pass.
"""

# N = targets, D = hidden size, V = vocabulary, R = targets of a chunk

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from yrunner.losses.chunks import even_rows
from yrunner.losses.divergence import (
    BaseHead,
    BaseSide,
    HiddenBase,
    LogitBase,
    TopBase,
    diverge,
    diverge_logits,
    log_probs_of,
    top_of,
)
from yrunner.losses.head_call import call_head
from yrunner.losses.head_work import HeadInputs, HeadWork, scale_gradients
from yrunner.losses.per_token import at_least_float32
from yrunner.losses.sweep import LogitForm


@dataclass(frozen=True)
class WantsBase:
    """Asks a model for its own side, to be held to it later."""

    top: int | None = None
    """Only so many of its likeliest tokens; None: all it takes to make its logits again."""


Held = WantsBase | HiddenBase | LogitBase | TopBase
"""What is asked of a fused head: its own side, or how far it has moved from another one."""


@dataclass(frozen=True)
class Divergence:
    """How far the targets of a micro-batch have moved, row by row."""

    total: Tensor
    """Sum over the targets, the only tensor with a gradient. Divided once, for the update."""
    divergence_N: Tensor
    """KL(base || tuned) in nats."""


def base_side(model: Any, inputs: Mapping[str, Tensor], top: int | None = None) -> BaseSide:
    """What `model` as it is now predicts for the targets of a batch; it has to be attached."""
    with torch.no_grad():
        found = model(**inputs, held=WantsBase(top), use_cache=False)
    if "ids_NK" in found:
        return TopBase(**found)
    return HiddenBase(**found) if "hidden_ND" in found else LogitBase(**found)


def measure_divergence(model: Any, inputs: Mapping[str, Tensor], side: BaseSide) -> Divergence:
    """How far `model` has moved from `side` on the targets of the same batch."""
    return Divergence(**model(**inputs, held=side, use_cache=False))


def answer_hidden(
    hidden_ND: Tensor, head: nn.Module, base: BaseHead, held: Held, rows: int, is_plain: bool
) -> dict[str, Tensor]:
    """The answer of a fused head that has found the hidden states before the targets."""
    # Logits of the base stand beside those of the model: half as many targets need the same memory.
    rows = even_rows(len(hidden_ND), rows if isinstance(held, TopBase) else max(1, rows // 2))
    if not isinstance(held, WantsBase):
        diverged = _linear_divergence if is_plain else _module_divergence
        return vars(diverged(hidden_ND, head, held, base, rows))
    if held.top is None:
        return {"hidden_ND": hidden_ND}
    top = held.top

    def run(hidden_ND: Tensor) -> tuple[Tensor, ...]:
        side = HiddenBase(hidden_ND)
        parts = [top_of(log_probs_of(side, chunk, base), top) for chunk in _chunks(side, rows)]
        return tuple(
            torch.cat(tensors)
            for tensors in zip(*(vars(part).values() for part in parts), strict=True)
        )

    return vars(TopBase(*call_head(head, run, hidden_ND)))


def answer_logits(logits_NV: Tensor, base: BaseHead, held: Held) -> dict[str, Tensor]:
    """The answer of a model whose logits exist already, final and in float32 at the least."""
    every = slice(0, len(logits_NV))
    if not isinstance(held, WantsBase):
        divergence_N = diverge_logits(logits_NV, held, every, base)
        return vars(Divergence(divergence_N.sum(), divergence_N.detach()))
    side = LogitBase(logits_NV)
    return vars(side if held.top is None else top_of(log_probs_of(side, every, base), held.top))


def _chunks(side: HiddenBase, rows: int) -> Iterator[slice]:
    """Without a target the head still runs: its weights get a gradient, of zero."""
    for start in range(0, max(1, len(side.hidden_ND)), rows):
        yield slice(start, start + rows)


def _linear_divergence(
    hidden_ND: Tensor, head: nn.Module, side: BaseSide, base: BaseHead, rows: int
) -> Divergence:
    wants_gradient = torch.is_grad_enabled()

    def run(hidden_ND: Tensor) -> Any:
        call = (hidden_ND, head.weight, head.bias, side, base, rows, wants_gradient)
        return _HeldHead.apply(*call)  # type: ignore[no-untyped-call]

    return Divergence(*call_head(head, run, hidden_ND))


def _module_divergence(
    hidden_ND: Tensor, head: nn.Module, side: BaseSide, base: BaseHead, rows: int
) -> Divergence:
    logits_of = head.forward

    def run_chunk(chunk_ND: Tensor, places: slice) -> Tensor:
        final_NV = base.form.apply(at_least_float32(logits_of(chunk_ND)))
        return diverge_logits(final_NV, side, places, base)

    def run(hidden_ND: Tensor) -> tuple[Tensor, ...]:
        parts = [
            checkpoint(run_chunk, hidden_ND[places], places, use_reentrant=False)
            for places in _chunks(HiddenBase(hidden_ND), rows)
        ]
        divergence_N = torch.cat(parts)
        return divergence_N.sum(), divergence_N.detach()

    if torch.is_grad_enabled() and not hidden_ND.requires_grad:
        # Of a head that is trained alone, ZeRO-3 knows by this gradient when it is done.
        hidden_ND = hidden_ND.detach().requires_grad_()
    return Divergence(*call_head(head, run, hidden_ND))


class _HeldHead(torch.autograd.Function):
    """Divergences of a plain head; `backward` only scales what `forward` computed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        side: BaseSide,
        base: BaseHead,
        rows: int,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        inputs = (hidden_ND, weight_VD, bias_V)
        needed = [wants_gradient and need for need in ctx.needs_input_grad[:3]]
        work = _Work(inputs, needed, base.form)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for places in _chunks(HiddenBase(hidden_ND), rows):
                work.do(places, side, base)
        work.hand_over(ctx)
        ctx.mark_non_differentiable(work.divergence_N)
        return work.divergence_N.sum(), work.divergence_N

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return (*scale_gradients(ctx, gradient), *[None] * 4)


class _Work(HeadWork):
    """What is found chunk by chunk: the divergences, and the gradients that are wanted."""

    def __init__(self, inputs: HeadInputs, needed: list[bool], form: LogitForm) -> None:
        super().__init__(inputs, needed)
        self.form = form
        self.divergence_N = self.hidden_ND.new_empty(len(self.hidden_ND), dtype=self.wide)

    def do(self, places: slice, side: BaseSide, base: BaseHead) -> None:
        """Look at one chunk and add what it gives to divergences and gradients."""
        chunk_ND = self.hidden_ND[places].to(self.dtype)
        product_NV = linear(chunk_ND, self.head_VD, self.head_V)
        final_NV = self.form.apply_(at_least_float32(product_NV))
        self.divergence_N[places], pull_NV = diverge(final_NV, side, places, base)
        pull_NV = self.form.pass_cap_(pull_NV, final_NV).mul_(self.form.scale)
        of_hidden_ND, of_head_VD, of_head_V = self.gradients
        pull_RV = pull_NV.to(self.dtype)
        if of_hidden_ND is not None:
            of_hidden_ND[places] = (pull_RV @ self.head_VD).to(of_hidden_ND.dtype)
        if of_head_VD is not None:
            of_head_VD.add_(pull_RV.T @ chunk_ND)
        if of_head_V is not None:
            of_head_V.add_(pull_NV.sum(dim=0))
