"""Hidden states to the weighted loss, a few targets at a time: all their logits never exist.

Two ways, equal in value and gradient. A plain linear head: the gradient is computed in the same
pass as the loss, and none for a head that is frozen. Any other head (LoRA on it, quantized): each
chunk goes through the module and, in the backward pass, once more.
"""

# N = targets, D = hidden size, V = vocabulary

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from yrunner.losses.per_token import Targets, TokenWeight, at_least_float32, weigh

CHUNK_BYTES = 32 * 2**20
"""Size of a chunk's float32 logits: about what the last cache of a processor holds."""
TILE_ELEMENTS = 2**17
"""Numbers that the cache of one core holds beside others."""
FEWEST_ROWS = 128
"""Fewer rows would spend the time on reading the head again and again."""


@dataclass(frozen=True)
class LogitForm:
    """What a model does with the product of hidden states and head."""

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, logits_NV: Tensor) -> Tensor:
        """Scaled and capped logits, in place."""
        if self.scale != 1.0:
            logits_NV.mul_(self.scale)
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV

    def apply(self, logits_NV: Tensor) -> Tensor:
        """The same for a tensor that autograd watches."""
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def pass_back_(self, gradient_NV: Tensor, logits_NV: Tensor) -> Tensor:
        """The gradient of the product from that of the final logits. Both are used up."""
        if self.softcap is not None:
            gradient_NV.mul_(logits_NV.div_(self.softcap).square_().neg_().add_(1))
        return gradient_NV if self.scale == 1.0 else gradient_NV.mul_(self.scale)


def chunk_rows(vocabulary_size: int) -> int:
    """Targets per chunk."""
    return max(FEWEST_ROWS, CHUNK_BYTES // (4 * vocabulary_size))


def linear_targets(
    hidden_ND: Tensor,
    head: nn.Linear,
    labels_N: Tensor,
    weight: TokenWeight,
    form: LogitForm,
    rows: int,
    wants_top: bool = False,
) -> Targets:
    """The targets of a plain linear head; the gradient is computed now, if one is wanted.

    The head is called, with this computation for its forward: what others have hooked to the call
    happens, of which ZeRO-3's gathering of the weights is one.
    """
    wants_gradient = torch.is_grad_enabled()

    def run(hidden_ND: Tensor) -> Any:
        call = (hidden_ND, head.weight, head.bias, labels_N, weight, form, rows)
        return _LinearHead.apply(*call, wants_gradient, wants_top)  # type: ignore[no-untyped-call]

    head.forward = run  # type: ignore[method-assign, assignment]
    try:
        return Targets(*head(hidden_ND))
    finally:
        del head.forward


def module_targets(
    hidden_ND: Tensor,
    head: nn.Module,
    labels_N: Tensor,
    weight: TokenWeight,
    form: LogitForm,
    rows: int,
    wants_top: bool = False,
) -> Targets:
    """The targets of any head: every chunk is computed again in the backward pass."""

    def run(chunk_ND: Tensor, chunk_N: Tensor) -> tuple[Tensor, ...]:
        logits_NV = form.apply(at_least_float32(head(chunk_ND)))
        found = vars(logit_targets(logits_NV, chunk_N, weight, wants_top)).values()
        return tuple(figure for figure in found if figure is not None)

    # Without a target the head still has to run: every trained weight gets a gradient, of zero.
    starts = range(0, max(1, len(labels_N)), rows)
    chunks = [(hidden_ND[at : at + rows], labels_N[at : at + rows]) for at in starts]
    parts = [checkpoint(run, *chunk, use_reentrant=False) for chunk in chunks]
    weighted, *figures = zip(*parts, strict=True)
    return Targets(torch.stack(weighted).sum(), *(torch.cat(parts) for parts in figures))


def logit_targets(
    logits_NV: Tensor, labels_N: Tensor, weight: TokenWeight, wants_top: bool = False
) -> Targets:
    """The targets of logits that exist already, in float32 at the least."""
    loss_N = cross_entropy(logits_NV, labels_N, reduction="none")
    with torch.no_grad():
        figures = _look_at(logits_NV.detach(), labels_N, weight)[1]
        top_N = logits_NV.argmax(dim=1) if wants_top else None
    return Targets(weigh(figures[2], loss_N).sum(), *figures, top_N)


def _look_at(
    logits_NV: Tensor, labels_N: Tensor, weight: TokenWeight, out: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Probabilities, written to `out` if given, and the figures of `Targets` but the first."""
    probability_NV = torch.softmax(logits_NV, dim=1, out=out)
    top_N = logits_NV.amax(dim=1)
    label_logit_N = logits_NV.gather(1, labels_N[:, None]).squeeze(1)
    # Of the likeliest token, which never underflows: the label's own probability can.
    log_top_N = probability_NV.amax(dim=1).log()
    loss_N = (top_N - label_logit_N) - log_top_N
    entropy_N = (top_N - _dot(probability_NV, logits_NV) - log_top_N).clamp(min=0)
    seen_N = entropy_N if weight.top is None else _entropy_of_top(logits_NV, weight.top)
    weight_N = weight.of(loss_N, seen_N)
    square_N = torch.linalg.vector_norm(probability_NV, dim=1).square()
    square_N = square_N - 2 * (-loss_N).exp() + 1
    gradient_N = weigh(weight_N, square_N.clamp(min=0).sqrt())
    is_top_N = (label_logit_N >= top_N).to(loss_N.dtype)
    return probability_NV, (loss_N, entropy_N, weight_N, is_top_N, gradient_N)


def _dot(left_NV: Tensor, right_NV: Tensor) -> Tensor:
    """Row times row, shape [N], in tiles: on a CPU the products never leave the cache."""
    num_rows, vocabulary_size = left_NV.shape
    columns = vocabulary_size
    if left_NV.device.type == "cpu":
        columns = max(256, TILE_ELEMENTS // max(1, num_rows))
    tiles = zip(torch.split(left_NV, columns, 1), torch.split(right_NV, columns, 1), strict=True)
    return torch.stack([(left * right).sum(dim=1) for left, right in tiles]).sum(dim=0)


def _entropy_of_top(logits_NV: Tensor, top: int) -> Tensor:
    """Entropy of the likeliest tokens, their probabilities scaled to a sum of 1, shape [N]."""
    logs_NK = logits_NV.topk(min(top, logits_NV.shape[1]), dim=1).values.log_softmax(dim=1)
    return -(logs_NK.exp() * logs_NK).sum(dim=1)


class _LinearHead(torch.autograd.Function):
    """Weighted loss and figures of targets; `backward` only scales what `forward` computed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        weight: TokenWeight,
        form: LogitForm,
        rows: int,
        wants_gradient: bool,
        wants_top: bool,
    ) -> tuple[Tensor, ...]:
        device = hidden_ND.device.type
        inputs = (hidden_ND, weight_VD, bias_V)
        needed = [wants_gradient and need for need in ctx.needs_input_grad[:3]]
        dtype = weight_VD.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        wide = torch.promote_types(dtype, torch.float32)
        gradients = [
            torch.zeros_like(tensor, dtype=wide if place else None)
            if need and tensor is not None
            else None
            for place, (tensor, need) in enumerate(zip(inputs, needed, strict=True))
        ]
        figures = [hidden_ND.new_empty(len(labels_N), dtype=wide) for _ in range(5)]
        top_N = torch.empty_like(labels_N)
        # One piece of memory for all chunks: a new one is slow, its pages have to be brought in.
        space = (min(rows, len(labels_N)), len(weight_VD))
        spaces = [hidden_ND.new_empty(space, dtype=wide) for _ in range(2)]
        # Cast once, by hand: autocast would cast a frozen head again for every chunk.
        with torch.autocast(device, enabled=False):
            head_VD = weight_VD.to(dtype)
            head_V = None if bias_V is None else bias_V.to(dtype)
            for start in range(0, len(labels_N), rows):
                chunk = slice(start, start + rows)
                chunk_ND = hidden_ND[chunk].to(dtype)
                logits_NV, probability_NV = (space_NV[: len(chunk_ND)] for space_NV in spaces)
                _multiply(chunk_ND, head_VD, head_V, out=logits_NV)
                form.apply_(logits_NV)
                found = _look_at(logits_NV, labels_N[chunk], weight, out=probability_NV)[1]
                for figure_N, values_N in zip(figures, found, strict=True):
                    figure_N[chunk] = values_N
                if wants_top:
                    top_N[chunk] = logits_NV.argmax(dim=1)
                if any(needed):
                    pull_NV = _pull_(probability_NV, labels_N[chunk], found[2])
                    pull_NV = form.pass_back_(pull_NV, logits_NV)
                    # What is not a number stays so when it is multiplied by the pull of 0.
                    chunk_ND = chunk_ND.masked_fill(~(found[2] > 0)[:, None], 0)
                    _add_gradients(gradients, chunk, pull_NV, chunk_ND, head_VD)
        ctx.gradients = gradients
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        if wants_top:
            figures.append(top_N)
        ctx.mark_non_differentiable(*figures)
        return (weigh(figures[2], figures[0]).sum(), *figures)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradient of a fused head can be taken once"
        scaled = (
            None if tensor is None else tensor.mul_(gradient).to(dtype)
            for tensor, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*scaled, *[None] * 6)


def _multiply(chunk_ND: Tensor, head_VD: Tensor, head_V: Tensor | None, out: Tensor) -> None:
    """Hidden states times head, written to `out`."""
    if out.dtype == chunk_ND.dtype:
        torch.mm(chunk_ND, head_VD.T, out=out)
        if head_V is not None:
            out.add_(head_V)
    else:
        out.copy_(linear(chunk_ND, head_VD, head_V))


def _pull_(probability_NV: Tensor, labels_N: Tensor, weight_N: Tensor) -> Tensor:
    """Weight times (softmax - one-hot), in the place of the probabilities; 0 where refused."""
    ones_N1 = torch.ones_like(weight_N)[:, None]
    probability_NV.scatter_add_(1, labels_N[:, None], -ones_N1)
    probability_NV.mul_(weight_N[:, None])
    return probability_NV.masked_fill_(~(weight_N > 0)[:, None], 0)


def _add_gradients(
    gradients: list[Tensor | None],
    chunk: slice,
    pull_NV: Tensor,
    chunk_ND: Tensor,
    head_VD: Tensor,
) -> None:
    """What a chunk adds to the gradients of hidden states, head and bias that are wanted."""
    of_hidden_ND, of_head_VD, of_bias_V = gradients
    if of_bias_V is not None:
        of_bias_V.add_(pull_NV.sum(dim=0))
    pull_NV = pull_NV.to(head_VD.dtype)
    if of_hidden_ND is not None:
        of_hidden_ND[chunk] = (pull_NV @ head_VD).to(of_hidden_ND.dtype)
    if of_head_VD is None:
        return
    if of_head_VD.dtype == pull_NV.dtype:
        of_head_VD.addmm_(pull_NV.T, chunk_ND)
    else:
        of_head_VD.add_(pull_NV.T @ chunk_ND)
