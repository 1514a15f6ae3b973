"""Hidden states to the weighted loss, a chunk of targets at a time; full logits never exist.

Two ways, equal in value and gradient. Plain linear head: the gradient is computed in the same pass
as the loss, and a frozen head costs none. Any other head (LoRA on it, quantized): each chunk runs
through the module and, in the backward pass, once more.
"""

# N = targets, D = hidden size, V = vocabulary, R = targets of the largest chunk

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from yrunner.losses.head_call import (
    ChunkAccumulator,
    HeadInputs,
    call_checkpointed_head,
    call_linear_head,
    even_rows,
)
from yrunner.losses.targets import Targets, TokenWeight, at_least_float32, weigh
from yrunner.losses.vocab_sweep import (
    FINAL,
    LogitForm,
    VocabStats,
    entropy_of_top,
    likeliest,
    sweep,
)

CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 2**28}
"""Float32 logits of a chunk: on a CPU what fits in its cache, on a GPU what keeps it busy."""
FEWEST_ROWS = 256
"""With fewer rows, reading the head again and again would take most of the time."""

Figures = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Loss, entropy, weight, top-1 hit and gradient norm of each target, as in `Targets`."""


class BufferPool:
    """Matrices that are reused from batch to batch; only on the CPU.

    There, mapping the pages of new memory takes longer than a pass over them. On a GPU torch caches
    memory itself.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """An uninitialised matrix; it overwrites the one taken under this name before."""
        size = shape[0] * shape[1]
        buffer = self.buffers.get(name)
        if buffer is None or buffer.dtype != dtype or buffer.numel() < size:
            self.buffers.pop(name, None)  # freed before the new one is allocated
            buffer = like.new_empty(size, dtype=dtype)
            if buffer.device.type == "cpu":
                self.buffers[name] = buffer
        return buffer[:size].view(shape)


def chunk_rows(vocabulary_size: int, device_type: str = "cpu") -> int:
    """Targets per chunk."""
    most_bytes = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"])
    return max(FEWEST_ROWS, most_bytes // (4 * vocabulary_size))


def has_kernel(device_type: str) -> bool:
    """Whether the fused Triton kernel can sweep over the vocabulary."""
    return device_type == "cuda" and find_spec("triton") is not None


def linear_targets(
    hidden_ND: Tensor,
    head: nn.Linear,
    labels_N: Tensor,
    weight: TokenWeight,
    form: LogitForm,
    rows: int,
    wants_top: bool = False,
    pool: BufferPool | None = None,
) -> Targets:
    """The targets of a plain linear head; the gradient, if one is wanted, is computed now."""
    # Few and even chunks: a product with few rows is slow.
    rows = even_rows(len(labels_N), rows)
    work = partial(
        LossAccumulator,
        labels_N=labels_N,
        weight=weight,
        form=form,
        rows=rows,
        pool=pool or BufferPool(),
        wants_top=wants_top,
    )
    return Targets(*call_linear_head(head, hidden_ND, work, rows))


def module_targets(
    hidden_ND: Tensor,
    head: nn.Module,
    labels_N: Tensor,
    weight: TokenWeight,
    form: LogitForm,
    rows: int,
    wants_top: bool = False,
) -> Targets:
    """The targets of any head; the backward pass computes every chunk again."""

    logits_of = head.forward

    def run_chunk(chunk_ND: Tensor, chunk: slice) -> tuple[Tensor, ...]:
        logits_NV = form.apply(at_least_float32(logits_of(chunk_ND)))
        found = vars(logit_targets(logits_NV, labels_N[chunk], weight, wants_top)).values()
        return tuple(figure for figure in found if figure is not None)

    def join(parts: list[Any]) -> tuple[Tensor, ...]:
        weighted, *figures = zip(*parts, strict=True)
        return (torch.stack(weighted).sum(), *(torch.cat(parts) for parts in figures))

    return Targets(*call_checkpointed_head(head, hidden_ND, run_chunk, join, rows))


def logit_targets(
    logits_NV: Tensor, labels_N: Tensor, weight: TokenWeight, wants_top: bool = False
) -> Targets:
    """The targets of full logits, in float32 or wider."""
    loss_N = cross_entropy(logits_NV, labels_N, reduction="none")
    with torch.no_grad():
        final_NV, stats = final_stats(logits_NV, labels_N)
        top_entropy_N = top_entropy(final_NV, weight, FINAL)
        figures = figures_of(stats, stats.mean_logit_N, weight, top_entropy_N)
        top_N = final_NV.argmax(dim=1) if wants_top else None
    return Targets(weigh(figures[2], loss_N).sum(), *figures, top_N)


def final_stats(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, VocabStats]:
    """Final logits without gradient, finite, and the statistics of their targets."""
    # Minus infinity, where a model forbids a token, would make the entropy NaN.
    final_NV = logits_NV.detach().clamp(min=torch.finfo(logits_NV.dtype).min)
    return final_NV, sweep(final_NV, labels_N, FINAL)[0]


def figures_of(
    stats: VocabStats,
    mean_logit_N: Tensor | None,
    weight: TokenWeight,
    top_entropy_N: Tensor | None,
) -> Figures:
    """Loss, entropy, weight, top-1 hit and gradient norm of each target."""
    assert mean_logit_N is not None
    entropy_N = stats.entropy(mean_logit_N)
    weight_N = weight.of(stats.loss_N, entropy_N if top_entropy_N is None else top_entropy_N)
    gradient_N = weigh(weight_N, stats.gradient_norm_N)
    return stats.loss_N, entropy_N, weight_N, stats.is_top_N, gradient_N


def top_entropy(logits_NV: Tensor, weight: TokenWeight, form: LogitForm) -> Tensor | None:
    """The entropy of the likeliest tokens by raw logits, for a weight that needs it."""
    return None if weight.top is None else entropy_of_top(logits_NV, weight.top, form)


class LossAccumulator(ChunkAccumulator):
    """The weighted loss, the figures of the targets, and the gradients."""

    def __init__(
        self,
        inputs: HeadInputs,
        needs_gradient: list[bool],
        *,
        labels_N: Tensor,
        weight: TokenWeight,
        form: LogitForm,
        rows: int,
        pool: BufferPool,
        wants_top: bool,
        needs_mean: bool = False,
    ) -> None:
        """`needs_mean`: before the product of gradient and head, where it is free otherwise."""
        super().__init__(inputs, needs_gradient)
        self.labels_N, self.weight, self.form, self.wants_top = labels_N, weight, form, wants_top
        num_targets, dtype = len(labels_N), self.sum_dtype
        self.figures = [self.hidden_ND.new_empty(num_targets, dtype=dtype) for _ in range(5)]
        self.top_N = torch.empty_like(labels_N)
        # The mean logit of a linear head follows from the gradient, if that is precise enough.
        is_linear = form.softcap is None and self.dtype == self.sum_dtype
        has_product = self.gradients[0] is not None and not needs_mean
        self.mean_from_gradient = is_linear and has_product
        self.has_kernel = has_kernel(self.hidden_ND.device.type)
        shape = (min(rows, num_targets), len(self.head_VD))
        dtype = self.dtype if self.has_kernel else self.sum_dtype
        self.grads_RV = self.logits_RV = pool.take("logits", self.hidden_ND, shape, dtype)
        if not (self.has_kernel or self.mean_from_gradient):
            self.grads_RV = pool.take("gradients", self.hidden_ND, shape, dtype)

    def add(self, chunk: slice) -> None:
        chunk_ND, labels_N = self.hidden_ND[chunk].to(self.dtype), self.labels_N[chunk]
        logits_NV = self._multiply(chunk_ND)
        top_entropy_N = top_entropy(logits_NV, self.weight, self.form)
        if self.wants_top:
            self.top_N[chunk] = likeliest(logits_NV)
        stats, grad_NV = self._sweep(logits_NV, labels_N, wants_mean=not self.mean_from_gradient)
        # Unweighted yet: the weight may depend on the entropy, which may come from this product.
        of_hidden_ND = self.gradients[0]
        grad_ND = None if of_hidden_ND is None else grad_NV.to(self.dtype) @ self.head_VD
        mean_N = stats.mean_logit_N
        if mean_N is None:
            mean_N = self._mean_from_gradient(stats, grad_NV, grad_ND, chunk_ND)
        figures = figures_of(stats, mean_N, self.weight, top_entropy_N)
        for figure_N, values_N in zip(self.figures, figures, strict=True):
            figure_N[chunk] = values_N
        factor_N1 = (self.form.scale * figures[2])[:, None]
        if of_hidden_ND is not None and grad_ND is not None:
            of_hidden_ND[chunk] = weigh(factor_N1, grad_ND)
        self._add_to_head(grad_NV, chunk_ND, factor_N1)

    def results(self) -> tuple[Tensor, ...]:
        loss_N, _, weight_N, *_ = self.figures
        top = (self.top_N,) if self.wants_top else ()
        return (weigh(weight_N, loss_N).sum(), *self.figures, *top)

    def add_to_head(self, chunk: slice, gradient_N: Tensor) -> None:
        """Add a chunk to the head's gradients alone, by the gradients of its unweighted losses."""
        chunk_ND = self.hidden_ND[chunk].to(self.dtype)
        logits_NV = self._multiply(chunk_ND)
        _, grad_NV = self._sweep(logits_NV, self.labels_N[chunk], wants_mean=False)
        self._add_to_head(grad_NV, chunk_ND, (self.form.scale * gradient_N)[:, None])

    def _sweep(
        self, logits_NV: Tensor, labels_N: Tensor, *, wants_mean: bool
    ) -> tuple[VocabStats, Tensor]:
        if self.has_kernel:
            from yrunner.losses.vocab_sweep_triton import sweep_on_gpu

            return sweep_on_gpu(logits_NV, labels_N, self.form)
        out = self.grads_RV[: len(labels_N)]
        return sweep(logits_NV, labels_N, self.form, out=out, wants_mean=wants_mean)

    def _multiply(self, chunk_ND: Tensor) -> Tensor:
        """Raw logits: hidden states times the head's weight, plus its bias."""
        logits_NV = self.logits_RV[: len(chunk_ND)]
        if logits_NV.dtype != self.dtype:
            return logits_NV.copy_(linear(chunk_ND, self.head_VD, self.head_V))
        torch.mm(chunk_ND, self.head_VD.T, out=logits_NV)
        return logits_NV if self.head_V is None else logits_NV.add_(self.head_V)

    def _mean_from_gradient(
        self, stats: VocabStats, grad_NV: Tensor, grad_ND: Tensor | None, chunk_ND: Tensor
    ) -> Tensor:
        """The mean logit of each target from the gradient at its hidden state.

        Logits are linear in the hidden state h: grad . logits = scale (grad W . h + grad . bias).
        """
        assert grad_ND is not None
        product_N = (grad_ND * chunk_ND).sum(dim=1)
        if self.head_V is not None:
            product_N += grad_NV @ self.head_V
        return self.form.scale * product_N + stats.label_logit_N

    def _add_to_head(self, grad_NV: Tensor, chunk_ND: Tensor, factor_N1: Tensor) -> None:
        """Add a chunk to the gradients of the head's weight and bias."""
        _, of_head_VD, of_head_V = self.gradients
        if of_head_VD is None and of_head_V is None:
            return
        # A refused target adds nothing, not even NaN.
        grad_NV.masked_fill_(~(factor_N1.abs() > 0), 0)
        if of_head_V is not None:
            of_head_V.add_((factor_N1 * grad_NV).sum(dim=0))
        if of_head_VD is None:
            return
        weighed_ND = weigh(factor_N1, chunk_ND).to(self.dtype)
        if of_head_VD.dtype == self.dtype:
            of_head_VD.addmm_(grad_NV.T, weighed_ND)
        else:
            of_head_VD.add_(grad_NV.to(self.dtype).T @ weighed_ND)
