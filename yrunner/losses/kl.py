"""KL(base || tuned): how far what a model predicts has moved from what its base predicts.

The base is given in one of three ways: by its last hidden states, of which logits are made when a
chunk needs them; by its likeliest tokens and the mass of all others; or by its logits.

The divergence of a model from its base, through the fused head: no two full arrays of logits.

A plain linear head: the gradient is computed in the same pass as the divergence. Any other head
(LoRA on it, quantized): each chunk is computed once more in the backward pass.
"""

# N = targets, D = hidden size, V = vocabulary, K = likeliest tokens that are known

# N = targets, D = hidden size, V = vocabulary, R = targets of a chunk

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from yrunner.losses.chunked_loss import even_rows
from yrunner.losses.head_call import HeadInputs, HeadWork, call_head, scale_gradients
from yrunner.losses.targets import at_least_float32
from yrunner.losses.vocab_sweep import LogitForm

COMPARED_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}
"""Logits of a few targets whose probabilities are made at once: a large vocabulary needs several
arrays of them, and on a processor these should stay in its cache."""


@dataclass(frozen=True)
class HiddenBase:
    """The base as its last hidden states before each target."""

    hidden_ND: Tensor


@dataclass(frozen=True)
class LogitBase:
    """The base as its final logits, for a model that makes them in a way of its own."""

    logits_NV: Tensor


@dataclass(frozen=True)
class TopBase:
    """The base as its likeliest tokens: what is cached of a base that is no longer in memory.

    All other tokens count as one, so the divergence is never above the true one, and the pull at
    the logits is off by at most twice their mass: the sum of |error| over the vocabulary.
    """

    ids_NK: Tensor
    log_NK: Tensor
    """Logarithms of their probabilities."""
    log_rest_N: Tensor
    """Logarithm of the mass of all other tokens."""

    def chunk(self, places: slice) -> "TopBase":
        """The same of some targets."""
        return TopBase(self.ids_NK[places], self.log_NK[places], self.log_rest_N[places])


BaseSide = HiddenBase | LogitBase | TopBase


@dataclass(frozen=True)
class BaseHead:
    """How a model makes logits where none of its head has been trained."""

    forward: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    form: LogitForm

    @classmethod
    def of(cls, head: nn.Module, form: LogitForm) -> "BaseHead":
        """The head as it is now: while it computes something of ours, its forward is replaced."""
        weight = next(head.parameters())
        return cls(head.forward, weight.dtype, form)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Final logits, in float32 at the least, shape [N, V]. Nothing is hooked to the call."""
        if self.dtype.is_floating_point:
            hidden_ND = hidden_ND.to(self.dtype)
        return self.form.apply_(at_least_float32(self.forward(hidden_ND)))


def log_probs_of(side: HiddenBase | LogitBase, places: slice, head: BaseHead) -> Tensor:
    """What the base predicts for some targets, as logarithms, shape [N, V]; new memory."""
    return torch.log_softmax(_base_logits(side, places, head), dim=1)


def _base_logits(side: HiddenBase | LogitBase, places: slice, head: BaseHead) -> Tensor:
    """The base's final logits of some targets, shape [N, V]; new memory."""
    if isinstance(side, LogitBase):
        return _finite(side.logits_NV[places])
    return head.logits(side.hidden_ND[places])


def diverge_all(final_NV: Tensor, log_base_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each target in nats, shape [N], and its gradient at the final logits.

    That gradient is tuned minus base. `log_base_NV` is used up.
    """
    tuned_NV = torch.log_softmax(final_NV, dim=1)
    base_NV = log_base_NV.exp()
    # A difference of logarithms, not of two sums: near zero, where it begins, it stays exact.
    divergence_N = log_base_NV.sub_(tuned_NV).mul_(base_NV).sum(dim=1)
    return divergence_N, tuned_NV.exp_().sub_(base_NV)


def diverge_top(final_NV: Tensor, base: TopBase) -> tuple[Tensor, Tensor]:
    """The same from the base's likeliest tokens."""
    log_tuned_NV = torch.log_softmax(final_NV, dim=1)
    log_top_NK = log_tuned_NV.gather(1, base.ids_NK)
    rest_NV = log_tuned_NV.exp_().scatter_(1, base.ids_NK, 0.0)
    least = torch.finfo(rest_NV.dtype).tiny
    rest_N = rest_NV.sum(dim=1).clamp_(min=least)
    base_NK, base_rest_N = base.log_NK.exp(), base.log_rest_N.exp()
    of_rest_N = torch.where(
        base_rest_N > 0, base_rest_N * (base.log_rest_N - rest_N.log()), torch.zeros_like(rest_N)
    )
    divergence_N = (base_NK * (base.log_NK - log_top_NK)).sum(dim=1) + of_rest_N
    # The rest of the base is taken to lie as that of the tuned model does.
    pull_NV = rest_NV.mul_((1 - base_rest_N / rest_N)[:, None])
    return divergence_N, pull_NV.scatter_(1, base.ids_NK, log_top_NK.exp() - base_NK)


def diverge(
    final_NV: Tensor, side: BaseSide, places: slice, head: BaseHead
) -> tuple[Tensor, Tensor]:
    """Divergence and pull of some targets, whatever is known of the base."""
    if isinstance(side, TopBase):
        return diverge_top(final_NV, side.chunk(places))
    base_NV = _base_logits(side, places, head)
    most = COMPARED_AT_ONCE.get(final_NV.device.type, COMPARED_AT_ONCE["cuda"])
    rows = max(1, most // final_NV.shape[1])
    divergence_N = final_NV.new_empty(len(final_NV))
    for start in range(0, len(final_NV), rows):
        few = slice(start, start + rows)
        log_base_NV = torch.log_softmax(base_NV[few], dim=1)
        # The pull takes the place of the base's logits: there are never more than two full arrays.
        divergence_N[few], base_NV[few] = diverge_all(final_NV[few], log_base_NV)
    return divergence_N, base_NV


def top_of(log_NV: Tensor, number: int) -> TopBase:
    """The likeliest tokens of some targets and the mass of the rest. `log_NV` is used up."""
    log_NK, ids_NK = log_NV.topk(min(number, log_NV.shape[1]), dim=1)
    log_rest_N = log_NV.scatter_(1, ids_NK, -torch.inf).logsumexp(dim=1)
    return TopBase(ids_NK, log_NK, log_rest_N)


def diverge_logits(final_NV: Tensor, side: BaseSide, places: slice, head: BaseHead) -> Tensor:
    """The divergences of logits that autograd watches; the base's side gets no gradient."""
    divergence_N: Tensor = _LogitDivergence.apply(  # type: ignore[no-untyped-call]
        final_NV, side, places, head
    )
    return divergence_N


class _LogitDivergence(torch.autograd.Function):
    """The pull is computed with the divergence, and kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, final_NV: Tensor, side: BaseSide, places: slice, head: BaseHead
    ) -> Tensor:
        divergence_N, pull_NV = diverge(_finite(final_NV), side, places, head)
        ctx.save_for_backward(pull_NV)
        return divergence_N

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, ...]:
        (pull_NV,) = ctx.saved_tensors
        return gradient_N[:, None] * pull_NV, None, None, None


def _finite(logits_NV: Tensor) -> Tensor:
    """Minus infinity, where a model forbids a token, would make zero times infinity of it."""
    return logits_NV.clamp(min=torch.finfo(logits_NV.dtype).min)


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
