"""Log-probabilities of targets through the fused head, whatever is made of them afterwards.

Preferences compare sums of log-probabilities, so the gradient of each target is known only in the
backward pass. Plain linear head: the slope of every log-probability at its hidden state is computed
with it, and the backward pass multiplies; only a trained head is swept over a second time, for its
own gradient. Any other head (LoRA on it, quantized): each chunk is computed again. Full logits
never exist.
"""

# N = targets, D = hidden size, V = vocabulary

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from yrunner.losses.chunked_loss import BufferPool, LossAccumulator, final_stats
from yrunner.losses.head_call import (
    HeadInputs,
    call_checkpointed_head,
    call_head,
    chunk_slices,
    even_rows,
)
from yrunner.losses.targets import PLAIN, at_least_float32, weigh
from yrunner.losses.vocab_sweep import LogitForm


@dataclass(frozen=True)
class LogProbRequest:
    """What to ask of a fused head."""

    temperature: float = 1.0
    """The logits are divided by it."""
    values: bool = False
    """Whether the critic is asked as well; see `add_critic`."""


@dataclass(frozen=True)
class TargetLogProbs:
    """The targets of a micro-batch, row by row."""

    log_prob_N: Tensor
    """Log-probability in nats, float32 or wider; differentiable."""
    entropy_N: Tensor
    """Entropy of the prediction in nats; detached."""
    value_N: Tensor | None = None
    """What the critic expects, if it was asked; differentiable."""


def measure_log_probs(
    model: Any, inputs: Mapping[str, Tensor], request: LogProbRequest | None = None
) -> TargetLogProbs:
    """The log-probabilities of a batch made by `collate`; call `attach` on the model first."""
    found = model(**inputs, log_probs=request or LogProbRequest(), use_cache=False)
    return TargetLogProbs(**found)


def linear_log_probs(
    hidden_ND: Tensor,
    head: nn.Linear,
    labels_N: Tensor,
    form: LogitForm,
    rows: int,
    pool: BufferPool | None = None,
) -> TargetLogProbs:
    """Of a plain linear head; at most `rows` targets at once."""
    rows = even_rows(len(labels_N), rows)
    work = partial(
        LossAccumulator,
        labels_N=labels_N,
        weight=PLAIN,
        form=form,
        rows=rows,
        pool=pool or BufferPool(),
        wants_top=False,
    )
    # Asked here: inside an autograd function gradients are always disabled.
    wants_gradient = torch.is_grad_enabled()

    def run(hidden_ND: Tensor) -> Any:
        call = (hidden_ND, head.weight, head.bias, work, rows, wants_gradient)
        return _LinearLogProbs.apply(*call)  # type: ignore[no-untyped-call]

    return TargetLogProbs(*call_head(head, run, hidden_ND))


def module_log_probs(
    hidden_ND: Tensor, head: nn.Module, labels_N: Tensor, form: LogitForm, rows: int
) -> TargetLogProbs:
    """Of any head."""
    logits_of = head.forward

    def run_chunk(chunk_ND: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        logits_NV = form.apply(at_least_float32(logits_of(chunk_ND)))
        found = logit_log_probs(logits_NV, labels_N[chunk])
        return found.log_prob_N, found.entropy_N

    def join(parts: list[Any]) -> tuple[Tensor, ...]:
        return tuple(torch.cat(figures) for figures in zip(*parts, strict=True))

    return TargetLogProbs(*call_checkpointed_head(head, hidden_ND, run_chunk, join, rows))


def logit_log_probs(logits_NV: Tensor, labels_N: Tensor) -> TargetLogProbs:
    """Of final logits, in float32 or wider."""
    loss_N = cross_entropy(logits_NV, labels_N, reduction="none")
    with torch.no_grad():
        _, stats = final_stats(logits_NV, labels_N)
        assert stats.mean_logit_N is not None, "a sweep makes the mean unless told otherwise"
        entropy_N = stats.entropy(stats.mean_logit_N)
    return TargetLogProbs(-loss_N, entropy_N)


class _LinearLogProbs(torch.autograd.Function):
    """`forward` finds the slope of each target; `backward` multiplies, and sweeps for the head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        accumulator: Callable[[HeadInputs, list[bool]], LossAccumulator],
        rows: int,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        device = hidden_ND.device.type
        ctx.again = (accumulator, rows)
        ctx.autocast = (
            device,
            torch.get_autocast_dtype(device),
            torch.is_autocast_enabled(device),
        )
        needs_gradient = [wants_gradient and needed for needed in ctx.needs_input_grad[:3]]
        work = accumulator((hidden_ND, weight_VD, bias_V), [needs_gradient[0], False, False])
        with torch.autocast(device, enabled=False):
            for chunk in chunk_slices(len(hidden_ND), rows):
                work.add(chunk)
        ctx.slope_ND = work.gradients[0]
        """Of the losses, which are minus the log-probabilities."""
        if any(needs_gradient[1:]):
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V)
        loss_N, entropy_N, *_ = work.figures
        ctx.mark_non_differentiable(entropy_N)
        return -loss_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        slope_ND: Tensor | None = ctx.slope_ND
        of_hidden_ND = None
        if slope_ND is not None:
            of_hidden_ND = weigh(-gradient_N[:, None], slope_ND).to(slope_ND.dtype)
        of_head = _sweep_for_head(ctx, -gradient_N) if ctx.saved_tensors else (None, None)
        return of_hidden_ND, *of_head, None, None, None


def _sweep_for_head(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the head's weight and bias, by those of the losses."""
    hidden_ND, weight_VD, bias_V = ctx.saved_tensors
    accumulator, rows = ctx.again
    device, dtype, is_enabled = ctx.autocast
    with torch.autocast(device, dtype=dtype, enabled=is_enabled):
        work: LossAccumulator = accumulator(
            (hidden_ND, weight_VD, bias_V), [False, *ctx.needs_input_grad[1:3]]
        )
    with torch.autocast(device, enabled=False):
        for chunk in chunk_slices(len(hidden_ND), rows):
            work.add_to_head(chunk, gradient_N[chunk])
    _, of_head_VD, of_head_V = (
        None if gradient is None else gradient.to(dtype)
        for gradient, dtype in zip(work.gradients, work.input_dtypes, strict=True)
    )
    return of_head_VD, of_head_V
