"""KL(base || tuned): how far what a model predicts has moved from what its base predicts.

The base is given in one of three ways: by its last hidden states, of which logits are made when a
chunk needs them; by its likeliest tokens and the mass of all others; or by its logits.
"""

# N = targets, D = hidden size, V = vocabulary, K = likeliest tokens that are known

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from yrunner.losses.per_token import at_least_float32
from yrunner.losses.sweep import LogitForm

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
