"""KL(base || tuned) of each target through the fused head, without two full arrays of logits.

The base is given by its last hidden states, of which logits are made chunk by chunk; by its
likeliest tokens and the mass of all others; or by its logits.

Plain linear head: the gradient is computed in the same pass as the divergence. Any other head (LoRA
on it, quantized): each chunk is computed once more in the backward pass.
"""

# N = targets, D = hidden size, V = vocabulary, K = likeliest tokens, R = targets of a chunk

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from yrunner.losses.head_call import (
    ChunkAccumulator,
    HeadInputs,
    call_checkpointed_head,
    call_head,
    call_linear_head,
    chunk_slices,
    even_rows,
)
from yrunner.losses.targets import at_least_float32
from yrunner.losses.vocab_sweep import LogitForm

COMPARED_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}
"""Logits whose probabilities are computed at once: that takes several arrays, which on a CPU should
fit in its cache."""


@dataclass(frozen=True)
class HiddenBase:
    """The base by its last hidden states before each target."""

    hidden_ND: Tensor


@dataclass(frozen=True)
class LogitBase:
    """The base by its final logits, for a model whose head cannot be fused."""

    logits_NV: Tensor


@dataclass(frozen=True)
class TopBase:
    """The base by its likeliest tokens: the cache of a base that is no longer in memory.

    All other tokens count as one, so the divergence never exceeds the true one, and the gradient at
    the logits is off by at most twice their mass (sum of |error| over the vocabulary).
    """

    ids_NK: Tensor
    log_NK: Tensor
    """Log probabilities of these tokens."""
    log_rest_N: Tensor
    """Log of the mass of all other tokens."""

    def chunk(self, chunk: slice) -> "TopBase":
        """Some of the targets."""
        return TopBase(self.ids_NK[chunk], self.log_NK[chunk], self.log_rest_N[chunk])


BasePrediction = HiddenBase | LogitBase | TopBase


@dataclass(frozen=True)
class PredictBase:
    """Ask a model for its own prediction, as the base of later divergences."""

    top: int | None = None
    """Only this many of its likeliest tokens; None: everything."""
    temperature: float = 1.0
    """What the logits are divided by before their likeliest tokens are taken."""
    num_tokens: int | None = None
    """Only ids below count among them; None: all."""

    def likeliest(self, final_NV: Tensor) -> TopBase:
        """The likeliest tokens by final logits."""
        assert self.top is not None
        compared_NV = final_NV[:, : self.num_tokens] / self.temperature
        return likeliest(compared_NV.log_softmax(dim=1), self.top)


KlRequest = PredictBase | BasePrediction
"""What to ask a fused head: its own prediction, or its divergence from the base's."""


@dataclass(frozen=True)
class Divergence:
    """KL of the targets of a micro-batch, row by row."""

    total: Tensor
    """Sum over the targets, the only tensor with a gradient. Divided once, for the update."""
    divergence_N: Tensor
    """KL(base || tuned) in nats."""


@dataclass(frozen=True)
class BaseHead:
    """The head of the base: without adapters and trained copies."""

    forward: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    form: LogitForm

    @classmethod
    def of(cls, head: nn.Module, form: LogitForm) -> "BaseHead":
        """Take the head's forward now: it is replaced while a loss is computed."""
        weight = next(head.parameters())
        return cls(head.forward, weight.dtype, form)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Final logits, in float32 or wider, shape [N, V]. Runs no hooks."""
        if self.dtype.is_floating_point:
            hidden_ND = hidden_ND.to(self.dtype)
        return self.form.apply_(at_least_float32(self.forward(hidden_ND)))


def predict_base(
    model: Any,
    inputs: Mapping[str, Tensor],
    top: int | None = None,
    *,
    temperature: float = 1.0,
    num_tokens: int | None = None,
) -> BasePrediction:
    """What `model`, as it is now, predicts for the targets of a batch; call `attach` first.

    `top`: only this many of its likeliest tokens, at a temperature, among the ids below
    `num_tokens`.
    """
    with torch.no_grad():
        request = PredictBase(top, temperature, num_tokens)
        found = model(**inputs, kl=request, use_cache=False)
    if "ids_NK" in found:
        return TopBase(**found)
    return HiddenBase(**found) if "hidden_ND" in found else LogitBase(**found)


def measure_divergence(
    model: Any, inputs: Mapping[str, Tensor], base: BasePrediction
) -> Divergence:
    """The divergence of `model` from the base's prediction for the targets of the same batch."""
    return Divergence(**model(**inputs, kl=base, use_cache=False))


def answer_from_hidden(
    hidden_ND: Tensor, head: nn.Module, base: BaseHead, request: KlRequest, rows: int, plain: bool
) -> dict[str, Tensor]:
    """Answer from the hidden states before the targets; `plain`: the head is a plain linear one."""
    # Logits of the base exist beside those of the model: half the targets take the same memory.
    rows = even_rows(len(hidden_ND), rows if isinstance(request, TopBase) else max(1, rows // 2))
    if not isinstance(request, PredictBase):
        measure = _linear_divergence if plain else _module_divergence
        return vars(measure(hidden_ND, head, request, base, rows))
    if request.top is None:
        return {"hidden_ND": hidden_ND}

    def run(hidden_ND: Tensor) -> tuple[Tensor, ...]:
        parts = [
            vars(request.likeliest(base.logits(hidden_ND[chunk]))).values()
            for chunk in chunk_slices(max(1, len(hidden_ND)), rows)
        ]
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    return vars(TopBase(*call_head(head, run, hidden_ND)))


def answer_from_logits(logits_NV: Tensor, base: BaseHead, request: KlRequest) -> dict[str, Tensor]:
    """Answer from full logits, final and in float32 or wider."""
    if not isinstance(request, PredictBase):
        divergence_N = _kl_of_logits(logits_NV, request, slice(0, len(logits_NV)), base)
        return vars(Divergence(divergence_N.sum(), divergence_N.detach()))
    if request.top is None:
        return vars(LogitBase(logits_NV))
    return vars(request.likeliest(finite(logits_NV)))


def likeliest(log_NV: Tensor, number: int) -> TopBase:
    """The likeliest tokens of each target and the mass of the rest. Overwrites `log_NV`."""
    log_NK, ids_NK = log_NV.topk(min(number, log_NV.shape[1]), dim=1)
    log_rest_N = log_NV.scatter_(1, ids_NK, -torch.inf).logsumexp(dim=1)
    return TopBase(ids_NK, log_NK, log_rest_N)


def kl_full(final_NV: Tensor, log_base_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL of each target in nats, shape [N], and its gradient at the final logits, tuned minus base.

    Overwrites `log_base_NV`.
    """
    tuned_NV = torch.log_softmax(final_NV, dim=1)
    base_NV = log_base_NV.exp()
    # A difference of logarithms, not of two sums: exact near zero, where training begins.
    divergence_N = log_base_NV.sub_(tuned_NV).mul_(base_NV).sum(dim=1)
    return divergence_N, tuned_NV.exp_().sub_(base_NV)


def kl_top(final_NV: Tensor, base: TopBase) -> tuple[Tensor, Tensor]:
    """As `kl_full`, from the base's likeliest tokens."""
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
    # Assumes that the base spreads its remaining mass as the tuned model does.
    grad_NV = rest_NV.mul_((1 - base_rest_N / rest_N)[:, None])
    return divergence_N, grad_NV.scatter_(1, base.ids_NK, log_top_NK.exp() - base_NK)


def _kl(
    final_NV: Tensor, base: BasePrediction, chunk: slice, head: BaseHead
) -> tuple[Tensor, Tensor]:
    """KL of a chunk and its gradient at the final logits."""
    if isinstance(base, TopBase):
        return kl_top(final_NV, base.chunk(chunk))
    if isinstance(base, LogitBase):
        base_NV = finite(base.logits_NV[chunk])
    else:
        base_NV = head.logits(base.hidden_ND[chunk])
    most = COMPARED_AT_ONCE.get(final_NV.device.type, COMPARED_AT_ONCE["cuda"])
    divergence_N = final_NV.new_empty(len(final_NV))
    for few in chunk_slices(len(final_NV), max(1, most // final_NV.shape[1])):
        log_base_NV = torch.log_softmax(base_NV[few], dim=1)
        # The gradient overwrites the base's logits: there are never more than two full arrays.
        divergence_N[few], base_NV[few] = kl_full(final_NV[few], log_base_NV)
    return divergence_N, base_NV


def _kl_of_logits(final_NV: Tensor, base: BasePrediction, chunk: slice, head: BaseHead) -> Tensor:
    """KL of a chunk, differentiable in `final_NV` only."""
    divergence_N: Tensor = _LogitDivergence.apply(  # type: ignore[no-untyped-call]
        final_NV, base, chunk, head
    )
    return divergence_N


class _LogitDivergence(torch.autograd.Function):
    """`forward` computes the gradient at the logits too."""

    @staticmethod
    def forward(
        ctx: Any, final_NV: Tensor, base: BasePrediction, chunk: slice, head: BaseHead
    ) -> Tensor:
        divergence_N, grad_NV = _kl(finite(final_NV), base, chunk, head)
        ctx.save_for_backward(grad_NV)
        return divergence_N

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NV,) = ctx.saved_tensors
        return gradient_N[:, None] * grad_NV, None, None, None


def finite(logits_NV: Tensor) -> Tensor:
    """A copy without minus infinity (a forbidden token): zero times infinity would be NaN."""
    return logits_NV.clamp(min=torch.finfo(logits_NV.dtype).min)


def _linear_divergence(
    hidden_ND: Tensor, head: nn.Module, base: BasePrediction, base_head: BaseHead, rows: int
) -> Divergence:
    work = partial(_KlAccumulator, base=base, base_head=base_head)
    return Divergence(*call_linear_head(head, hidden_ND, work, rows))


def _module_divergence(
    hidden_ND: Tensor, head: nn.Module, base: BasePrediction, base_head: BaseHead, rows: int
) -> Divergence:
    logits_of = head.forward

    def run_chunk(chunk_ND: Tensor, chunk: slice) -> Tensor:
        final_NV = base_head.form.apply(at_least_float32(logits_of(chunk_ND)))
        return _kl_of_logits(final_NV, base, chunk, base_head)

    def join(parts: list[Tensor]) -> tuple[Tensor, ...]:
        divergence_N = torch.cat(parts)
        return divergence_N.sum(), divergence_N.detach()

    return Divergence(*call_checkpointed_head(head, hidden_ND, run_chunk, join, rows))


class _KlAccumulator(ChunkAccumulator):
    """The divergences of the targets, and the gradients."""

    def __init__(
        self,
        inputs: HeadInputs,
        needs_gradient: list[bool],
        *,
        base: BasePrediction,
        base_head: BaseHead,
    ) -> None:
        super().__init__(inputs, needs_gradient)
        self.base, self.base_head, self.form = base, base_head, base_head.form
        self.divergence_N = self.hidden_ND.new_empty(len(self.hidden_ND), dtype=self.sum_dtype)

    def add(self, chunk: slice) -> None:
        chunk_ND = self.hidden_ND[chunk].to(self.dtype)
        product_NV = linear(chunk_ND, self.head_VD, self.head_V)
        final_NV = self.form.apply_(at_least_float32(product_NV))
        self.divergence_N[chunk], grad_NV = _kl(final_NV, self.base, chunk, self.base_head)
        grad_NV = self.form.cap_backward_(grad_NV, final_NV).mul_(self.form.scale)
        of_hidden_ND, of_head_VD, of_head_V = self.gradients
        grad_RV = grad_NV.to(self.dtype)
        if of_hidden_ND is not None:
            of_hidden_ND[chunk] = (grad_RV @ self.head_VD).to(of_hidden_ND.dtype)
        if of_head_VD is not None:
            of_head_VD.add_(grad_RV.T @ chunk_ND)
        if of_head_V is not None:
            of_head_V.add_(grad_NV.sum(dim=0))

    def results(self) -> tuple[Tensor, ...]:
        return self.divergence_N.sum(), self.divergence_N
