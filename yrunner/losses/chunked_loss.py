"""Hidden states to the weighted loss, a few targets at a time: all their logits never exist.

Two ways, equal in value and gradient. A plain linear head: the gradient is computed in the same
pass as the loss, and none for a head that is frozen. Any other head (LoRA on it, quantized): each
chunk goes through the module and, in the backward pass, once more.
"""

# N = targets, D = hidden size, V = vocabulary

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from yrunner.losses.head_call import HeadInputs, HeadWork, Space, call_head, scale_gradients
from yrunner.losses.targets import Targets, TokenWeight, at_least_float32, weigh
from yrunner.losses.vocab_sweep import FINAL, LogitForm, Sweep, entropy_of_top, sweep

CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 2**28}
"""Float32 logits of a chunk: on a processor what its cache holds, on a GPU what keeps it busy."""
FEWEST_ROWS = 256
"""Fewer rows would spend the time on reading the head again and again."""

Figures = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Loss, entropy, weight, top-1 hit and gradient norm of each target, as in `Targets`."""


def chunk_rows(vocabulary_size: int, device_type: str = "cpu") -> int:
    """Targets per chunk."""
    most_bytes = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"])
    return max(FEWEST_ROWS, most_bytes // (4 * vocabulary_size))


def even_rows(num_targets: int, rows: int) -> int:
    """Targets per chunk, at most `rows`, if all chunks are as large as each other."""
    num_chunks = -(-num_targets // rows)
    return -(-num_targets // max(1, num_chunks)) or rows


def has_kernel(device_type: str) -> bool:
    """Whether one kernel sweeps over the vocabulary, in place, where torch takes several."""
    return device_type == "cuda" and find_spec("triton") is not None


def linear_targets(
    hidden_ND: Tensor,
    head: nn.Linear,
    labels_N: Tensor,
    weight: TokenWeight,
    form: LogitForm,
    rows: int,
    wants_top: bool = False,
    space: Space | None = None,
) -> Targets:
    """The targets of a plain linear head; the gradient is computed now, if one is wanted.

    The head is called, with this computation for its forward: what others have hooked to the call
    happens, of which ZeRO-3's gathering of the weights is one.
    """
    wants_gradient = torch.is_grad_enabled()
    space = space or Space()

    def run(hidden_ND: Tensor) -> Any:
        call = (hidden_ND, head.weight, head.bias, labels_N, weight, form, rows, space)
        return _LinearHead.apply(*call, wants_gradient, wants_top)  # type: ignore[no-untyped-call]

    return Targets(*call_head(head, run, hidden_ND))


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

    logits_of = head.forward

    def run_chunk(chunk_ND: Tensor, chunk_N: Tensor) -> tuple[Tensor, ...]:
        logits_NV = form.apply(at_least_float32(logits_of(chunk_ND)))
        found = vars(logit_targets(logits_NV, chunk_N, weight, wants_top)).values()
        return tuple(figure for figure in found if figure is not None)

    def run(hidden_ND: Tensor) -> tuple[Tensor, ...]:
        # Without a target the head still has to run: every trained weight gets a gradient, of zero.
        starts = range(0, max(1, len(labels_N)), rows)
        chunks = [(hidden_ND[at : at + rows], labels_N[at : at + rows]) for at in starts]
        parts = [checkpoint(run_chunk, *chunk, use_reentrant=False) for chunk in chunks]
        weighted, *figures = zip(*parts, strict=True)
        return (torch.stack(weighted).sum(), *(torch.cat(parts) for parts in figures))

    if torch.is_grad_enabled() and not hidden_ND.requires_grad:
        # Of a head that is trained alone, ZeRO-3 knows by this gradient when it is done.
        hidden_ND = hidden_ND.detach().requires_grad_()
    return Targets(*call_head(head, run, hidden_ND))


def logit_targets(
    logits_NV: Tensor, labels_N: Tensor, weight: TokenWeight, wants_top: bool = False
) -> Targets:
    """The targets of logits that exist already, in float32 at the least."""
    loss_N = cross_entropy(logits_NV, labels_N, reduction="none")
    with torch.no_grad():
        # Minus infinity, where a model forbids a token, would make the entropy no number.
        final_NV = logits_NV.detach().clamp(min=torch.finfo(logits_NV.dtype).min)
        found, _ = sweep(final_NV, labels_N, FINAL)
        top_entropy_N = _top_entropy(final_NV, weight, FINAL)
        figures = _figures(found, found.mean_logit_N, weight, top_entropy_N)
        top_N = final_NV.argmax(dim=1) if wants_top else None
    return Targets(weigh(figures[2], loss_N).sum(), *figures, top_N)


def _figures(
    found: Sweep, mean_logit_N: Tensor | None, weight: TokenWeight, top_entropy_N: Tensor | None
) -> Figures:
    assert mean_logit_N is not None
    entropy_N = found.entropy(mean_logit_N)
    weight_N = weight.of(found.loss_N, entropy_N if top_entropy_N is None else top_entropy_N)
    gradient_N = weigh(weight_N, found.pull_norm_N)
    return found.loss_N, entropy_N, weight_N, found.is_top_N, gradient_N


def _top_entropy(logits_NV: Tensor, weight: TokenWeight, form: LogitForm) -> Tensor | None:
    return None if weight.top is None else entropy_of_top(logits_NV, weight.top, form)


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
        space: Space,
        wants_gradient: bool,
        wants_top: bool,
    ) -> tuple[Tensor, ...]:
        inputs = (hidden_ND, weight_VD, bias_V)
        needed = [wants_gradient and need for need in ctx.needs_input_grad[:3]]
        # As few chunks, and as even: a product with few rows is slow.
        rows = even_rows(len(labels_N), rows)
        work = _Work(inputs, needed, labels_N, weight, form, rows, space, wants_top)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, len(labels_N), rows):
                work.do(slice(start, start + rows))
        work.hand_over(ctx)
        figures = [*work.figures, work.top_N] if wants_top else work.figures
        ctx.mark_non_differentiable(*figures)
        loss_N, _, weight_N, *_ = figures
        return (weigh(weight_N, loss_N).sum(), *figures)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return (*scale_gradients(ctx, gradient), *[None] * 7)


class _Work(HeadWork):
    """What is found chunk by chunk: the figures, and the gradients that are wanted."""

    def __init__(
        self,
        inputs: HeadInputs,
        needed: list[bool],
        labels_N: Tensor,
        weight: TokenWeight,
        form: LogitForm,
        rows: int,
        space: Space,
        wants_top: bool,
    ) -> None:
        super().__init__(inputs, needed)
        self.labels_N, self.weight, self.form, self.wants_top = labels_N, weight, form, wants_top
        self.figures = [self.hidden_ND.new_empty(len(labels_N), dtype=self.wide) for _ in range(5)]
        self.top_N = torch.empty_like(labels_N)
        # The mean logit of a linear head comes with the gradient, if that is precise enough.
        is_linear = form.softcap is None and self.dtype == self.wide
        self.mean_comes_free = is_linear and self.gradients[0] is not None
        self.has_kernel = has_kernel(self.hidden_ND.device.type)
        shape = (min(rows, len(labels_N)), len(self.head_VD))
        dtype = self.dtype if self.has_kernel else self.wide
        self.pulls_RV = self.logits_RV = space.take("logits", self.hidden_ND, shape, dtype)
        if not (self.has_kernel or self.mean_comes_free):
            self.pulls_RV = space.take("pulls", self.hidden_ND, shape, dtype)

    def do(self, chunk: slice) -> None:
        """Look at one chunk and add what it gives to figures and gradients."""
        chunk_ND, labels_N = self.hidden_ND[chunk].to(self.dtype), self.labels_N[chunk]
        logits_NV = self._multiply(chunk_ND)
        top_entropy_N = _top_entropy(logits_NV, self.weight, self.form)
        if self.wants_top:
            self.top_N[chunk] = logits_NV.argmax(dim=1)
        found, pull_NV = self._sweep(logits_NV, labels_N)
        # Not weighed yet: the weight may depend on the entropy, which may come from the product.
        of_hidden_ND = self.gradients[0]
        pulled_ND = None if of_hidden_ND is None else pull_NV.to(self.dtype) @ self.head_VD
        mean_N = found.mean_logit_N
        if mean_N is None:
            mean_N = self._free_mean(found, pull_NV, pulled_ND, chunk_ND)
        figures = _figures(found, mean_N, self.weight, top_entropy_N)
        for figure_N, values_N in zip(self.figures, figures, strict=True):
            figure_N[chunk] = values_N
        factor_N1 = (self.form.scale * figures[2])[:, None]
        if of_hidden_ND is not None and pulled_ND is not None:
            of_hidden_ND[chunk] = weigh(factor_N1, pulled_ND)
        self._add_to_head(pull_NV, chunk_ND, factor_N1)

    def _sweep(self, logits_NV: Tensor, labels_N: Tensor) -> tuple[Sweep, Tensor]:
        if self.has_kernel:
            from yrunner.losses.vocab_sweep_triton import sweep_on_gpu

            return sweep_on_gpu(logits_NV, labels_N, self.form)
        out = self.pulls_RV[: len(labels_N)]
        return sweep(logits_NV, labels_N, self.form, out=out, wants_mean=not self.mean_comes_free)

    def _multiply(self, chunk_ND: Tensor) -> Tensor:
        """The product of hidden states and head, its bias added."""
        logits_NV = self.logits_RV[: len(chunk_ND)]
        if logits_NV.dtype != self.dtype:
            return logits_NV.copy_(linear(chunk_ND, self.head_VD, self.head_V))
        torch.mm(chunk_ND, self.head_VD.T, out=logits_NV)
        return logits_NV if self.head_V is None else logits_NV.add_(self.head_V)

    def _free_mean(
        self, found: Sweep, pull_NV: Tensor, pulled_ND: Tensor | None, chunk_ND: Tensor
    ) -> Tensor:
        """The mean logit of each target from what it pulls at its hidden state.

        Logits are linear in the hidden state h: pull . logits = scale (pull W . h + pull . bias).
        """
        assert pulled_ND is not None
        product_N = (pulled_ND * chunk_ND).sum(dim=1)
        if self.head_V is not None:
            product_N += pull_NV @ self.head_V
        return self.form.scale * product_N + found.label_logit_N

    def _add_to_head(self, pull_NV: Tensor, chunk_ND: Tensor, factor_N1: Tensor) -> None:
        """Add a chunk's part to the gradients of the head's weight and bias that are wanted."""
        _, of_head_VD, of_head_V = self.gradients
        if of_head_VD is None and of_head_V is None:
            return
        # A refused target gives nothing, not even something that is not a number.
        pull_NV.masked_fill_(~(factor_N1 > 0), 0)
        if of_head_V is not None:
            of_head_V.add_((factor_N1 * pull_NV).sum(dim=0))
        if of_head_VD is None:
            return
        weighed_ND = weigh(factor_N1, chunk_ND).to(self.dtype)
        if of_head_VD.dtype == self.dtype:
            of_head_VD.addmm_(pull_NV.T, weighed_ND)
        else:
            of_head_VD.add_(pull_NV.to(self.dtype).T @ weighed_ND)
