"""Learning from a teacher: its divergence from the student, in one sweep with the loss of labels.

The teacher is given by its last hidden states and its own head, by its logits, or by its likeliest
tokens and the mass of all others. In the last case the divergence is that of the coarser
distributions, where all other tokens are one: never above the true one, by the data-processing
inequality.
"""

# N = targets, D = hidden size, V = vocabulary, K = likeliest tokens, C = these and the rest

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from yrunner.losses.chunked_loss import (
    BufferPool,
    LossAccumulator,
    figures_of,
    logit_targets,
    top_entropy,
)
from yrunner.losses.head_call import (
    HeadInputs,
    call_checkpointed_head,
    call_linear_head,
    chunk_slices,
    even_rows,
)
from yrunner.losses.kl import (
    COMPARED_AT_ONCE,
    BaseHead,
    HiddenBase,
    LogitBase,
    TopBase,
    finite,
    kl_full,
    kl_top,
)
from yrunner.losses.targets import Targets, TokenWeight, at_least_float32, weigh
from yrunner.losses.vocab_sweep import LogitForm

Measure = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True)
class TeacherDivergence:
    """How a student's prediction is compared with its teacher's."""

    by: Measure = "forward_kl"
    """KL(teacher || student), KL(student || teacher), or the generalised Jensen-Shannon divergence
    beta KL(teacher || mix) + (1 - beta) KL(student || mix), mix = beta teacher + (1 - beta) student
    (Agarwal et al., 2024, arXiv:2306.13649)."""
    beta: float = 0.5
    temperature: float = 1.0
    """What both logits are divided by."""
    num_tokens: int | None = None
    """Compare only the ids below; None: all. Both sides are renormalised."""

    def of_logits(self, final_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Divergence of each target in nats, shape [N], and its gradient at `final_NV`.

        The gradient has the shape [N, tokens compared]. Overwrites `teacher_NV`.
        """
        log_teacher_NV = self._scaled(teacher_NV).log_softmax(dim=1)
        if self.by == "forward_kl":
            divergence_N, grad_NV = kl_full(self._scaled(final_NV), log_teacher_NV)
        else:
            log_student_NV = self._scaled(final_NV).log_softmax(dim=1)
            divergence_N, grad_NV = self._slopes(log_student_NV, log_teacher_NV)
            grad_NV.mul_(log_student_NV.exp_())
        return divergence_N, grad_NV.div_(self.temperature)

    def of_top(self, final_NV: Tensor, top: TopBase) -> tuple[Tensor, Tensor]:
        """As `of_logits`, from the teacher's likeliest tokens at this temperature."""
        if self.by == "forward_kl":
            divergence_N, grad_NV = kl_top(self._scaled(final_NV), top)
            return divergence_N, grad_NV.div_(self.temperature)
        log_student_NV = self._scaled(final_NV).log_softmax(dim=1)
        log_top_NK = log_student_NV.gather(1, top.ids_NK)
        rest_NV = log_student_NV.exp_().scatter_(1, top.ids_NK, 0.0)
        least = torch.finfo(rest_NV.dtype).tiny
        log_rest_N1 = rest_NV.sum(dim=1, keepdim=True).clamp_(min=least).log()
        # If all tokens are among the likeliest, the rest has no mass on either side.
        rest_N1 = top.log_rest_N[:, None].to(log_rest_N1.dtype)
        rest_N1 = torch.where(rest_N1 > -torch.inf, rest_N1, log_rest_N1)
        log_teacher_NC = torch.cat([top.log_NK.to(rest_N1.dtype), rest_N1], dim=1)
        log_student_NC = torch.cat([log_top_NK, log_rest_N1], dim=1)
        divergence_N, slope_NC = self._slopes(log_student_NC, log_teacher_NC)
        grad_NV = rest_NV.mul_(slope_NC[:, -1:])
        grad_NV.scatter_(1, top.ids_NK, log_top_NK.exp() * slope_NC[:, :-1])
        return divergence_N, grad_NV.div_(self.temperature)

    def _scaled(self, logits_NV: Tensor) -> Tensor:
        compared_NV = logits_NV[:, : self.num_tokens]
        return compared_NV if self.temperature == 1.0 else compared_NV / self.temperature

    def _slopes(self, log_student_NC: Tensor, log_teacher_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Reverse KL or JSD, and the gradient at the student's logits over its probabilities."""
        student_NC = log_student_NC.exp()
        if self.by == "reverse_kl":
            slope_NC = log_student_NC - log_teacher_NC
            divergence_N = (student_NC * slope_NC).sum(dim=1)
            return divergence_N, slope_NC.sub_(divergence_N[:, None])
        mixed_NC = torch.logaddexp(
            log_student_NC + math.log1p(-self.beta), log_teacher_NC + math.log(self.beta)
        )
        of_teacher_N = (log_teacher_NC.exp() * (log_teacher_NC - mixed_NC)).sum(dim=1)
        slope_NC = mixed_NC.neg_().add_(log_student_NC)
        of_student_N = (student_NC * slope_NC).sum(dim=1)
        divergence_N = self.beta * of_teacher_N + (1 - self.beta) * of_student_N
        return divergence_N, slope_NC.sub_(of_student_N[:, None]).mul_(1 - self.beta)


@dataclass(frozen=True)
class Lesson:
    """What a teacher predicts for the targets of a micro-batch, and what it counts in the loss."""

    prediction: HiddenBase | LogitBase | TopBase
    head: BaseHead | None
    """The teacher's, for its hidden states."""
    divergence: TeacherDivergence
    label_factor: float | Tensor
    """Of weight times cross-entropy of a label: its part in the loss over what is divided by."""
    teacher_factor: float | Tensor
    """The same of a divergence."""
    weighs: bool = False
    """Whether the weight of a target multiplies its divergence too."""
    is_label_N: Tensor | None = None
    """Which targets are labels, and not what the student wrote; None: all."""

    def compare(self, final_NV: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        """Divergence of a chunk of targets, and its gradient at their final logits, [N, V]."""
        if isinstance(self.prediction, TopBase):
            divergence_N, grad_NV = self.divergence.of_top(final_NV, self.prediction.chunk(chunk))
            return divergence_N, _widened(grad_NV, final_NV.shape[1])
        if isinstance(self.prediction, LogitBase):
            teacher_NV = finite(self.prediction.logits_NV[chunk])
        else:
            assert self.head is not None, "hidden states need the teacher's head"
            teacher_NV = self.head.logits(self.prediction.hidden_ND[chunk]).to(final_NV.dtype)
        most = COMPARED_AT_ONCE.get(final_NV.device.type, COMPARED_AT_ONCE["cuda"])
        divergence_N, vocabulary_size = final_NV.new_empty(len(final_NV)), final_NV.shape[1]
        fits = teacher_NV.shape[1] == vocabulary_size
        grad_NV = teacher_NV if fits else torch.zeros_like(final_NV)
        for few in chunk_slices(len(final_NV), max(1, most // vocabulary_size)):
            divergence_N[few], few_NV = self.divergence.of_logits(final_NV[few], teacher_NV[few])
            # Overwrites the teacher's logits where it can: there are never more full arrays.
            grad_NV[few] = _widened(few_NV, vocabulary_size)
        return divergence_N, grad_NV

    def label_weights(self, weight_N: Tensor, chunk: slice) -> Tensor:
        """The factor of each cross-entropy in the loss; 0 for refused targets, even if NaN."""
        weight_N = torch.where(weight_N > 0, weight_N, torch.zeros_like(weight_N))
        if self.is_label_N is not None:
            weight_N = weight_N * self.is_label_N[chunk]
        return weight_N * self.label_factor

    def teacher_weights(self, weight_N: Tensor) -> Tensor:
        """The factor of each divergence in the loss."""
        if not self.weighs:
            return torch.ones_like(weight_N) * self.teacher_factor
        return torch.where(weight_N > 0, weight_N, 0.0) * self.teacher_factor


def _widened(grad_NV: Tensor, vocabulary_size: int) -> Tensor:
    """With a gradient of zero for the tokens that are not compared."""
    return nn.functional.pad(grad_NV, (0, vocabulary_size - grad_NV.shape[1]))


def taught_targets(
    hidden_ND: Tensor,
    head: nn.Module,
    labels_N: Tensor,
    weight: TokenWeight,
    form: LogitForm,
    rows: int,
    lesson: Lesson,
    *,
    plain: bool,
    pool: BufferPool | None = None,
) -> Targets:
    """The targets of a student and its teacher; `plain`: the student's head is a linear one."""
    # Logits of the teacher exist beside those of the student: half the targets take as much memory.
    rows = even_rows(len(labels_N), max(1, rows // 2))
    if plain:
        work = partial(
            _TaughtAccumulator,
            labels_N=labels_N,
            weight=weight,
            form=form,
            rows=rows,
            pool=pool or BufferPool(),
            wants_top=False,
            lesson=lesson,
        )
        return _targets_of(call_linear_head(head, hidden_ND, work, rows))
    return _module_targets(hidden_ND, head, labels_N, weight, form, rows, lesson)


def taught_logit_targets(
    logits_NV: Tensor, labels_N: Tensor, weight: TokenWeight, lesson: Lesson, chunk: slice
) -> Targets:
    """The same from final logits in float32 or wider; `chunk`: which targets of the lesson."""
    # Gives loss, figures and weights; the sum is made anew, of both parts.
    found = logit_targets(logits_NV.detach(), labels_N, weight)
    loss_N = nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
    divergence_N: Tensor = _LogitDivergence.apply(  # type: ignore[no-untyped-call]
        logits_NV, lesson, chunk
    )
    total = weigh(lesson.label_weights(found.weight_N, chunk), loss_N).sum()
    total = total + weigh(lesson.teacher_weights(found.weight_N), divergence_N).sum()
    return replace(found, weighted=total, divergence_N=divergence_N.detach())


class _LogitDivergence(torch.autograd.Function):
    """`forward` computes the gradient at the logits too."""

    @staticmethod
    def forward(ctx: Any, final_NV: Tensor, lesson: Lesson, chunk: slice) -> Tensor:
        divergence_N, grad_NV = lesson.compare(finite(final_NV), chunk)
        ctx.save_for_backward(grad_NV)
        return divergence_N

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NV,) = ctx.saved_tensors
        return gradient_N[:, None] * grad_NV, None, None


def _module_targets(
    hidden_ND: Tensor,
    head: nn.Module,
    labels_N: Tensor,
    weight: TokenWeight,
    form: LogitForm,
    rows: int,
    lesson: Lesson,
) -> Targets:
    logits_of: Callable[[Tensor], Tensor] = head.forward

    def run_chunk(chunk_ND: Tensor, chunk: slice) -> tuple[Tensor, ...]:
        logits_NV = form.apply(at_least_float32(logits_of(chunk_ND)))
        found = vars(taught_logit_targets(logits_NV, labels_N[chunk], weight, lesson, chunk))
        return tuple(figure for figure in found.values() if figure is not None)

    def join(parts: list[Any]) -> tuple[Tensor, ...]:
        total, *figures = zip(*parts, strict=True)
        return (torch.stack(total).sum(), *(torch.cat(parts) for parts in figures))

    return _targets_of(call_checkpointed_head(head, hidden_ND, run_chunk, join, rows))


def _targets_of(found: tuple[Tensor, ...]) -> Targets:
    """From the total, the figures of all targets, and the divergences."""
    *figures, divergence_N = found
    return replace(Targets(*figures), divergence_N=divergence_N)


class _TaughtAccumulator(LossAccumulator):
    """Both losses of the targets, their figures, and the gradients of their sum."""

    def __init__(
        self, inputs: HeadInputs, needs_gradient: list[bool], *, lesson: Lesson, **options: Any
    ) -> None:
        super().__init__(inputs, needs_gradient, needs_mean=True, **options)
        self.lesson = lesson
        self.total = self.hidden_ND.new_zeros((), dtype=self.sum_dtype)
        self.divergence_N = torch.empty_like(self.figures[0])

    def add(self, chunk: slice) -> None:
        chunk_ND, labels_N = self.hidden_ND[chunk].to(self.dtype), self.labels_N[chunk]
        logits_NV = self._multiply(chunk_ND)
        top_entropy_N = top_entropy(logits_NV, self.weight, self.form)
        final_NV = self.form.apply(at_least_float32(logits_NV))
        divergence_N, grad_NV = self.lesson.compare(final_NV, chunk)
        if self.form.softcap is not None:
            grad_NV = self.form.cap_backward_(grad_NV, final_NV.clone())
        # The sweep overwrites the logits.
        stats, of_labels_NV = self._sweep(logits_NV, labels_N, wants_mean=True)
        figures = figures_of(stats, stats.mean_logit_N, self.weight, top_entropy_N)
        for figure_N, values_N in zip(self.figures, figures, strict=True):
            figure_N[chunk] = values_N
        self.divergence_N[chunk] = divergence_N
        label_N = self.lesson.label_weights(figures[2], chunk)
        teacher_N = self.lesson.teacher_weights(figures[2])
        self.total += weigh(label_N, stats.loss_N).sum() + weigh(teacher_N, divergence_N).sum()
        # A refused target adds nothing, not even NaN.
        of_labels_NV.masked_fill_(label_N[:, None] == 0, 0)
        grad_NV.mul_(teacher_N[:, None]).addcmul_(of_labels_NV, label_N[:, None])
        self._add_gradient(grad_NV.mul_(self.form.scale), chunk_ND, chunk)

    def results(self) -> tuple[Tensor, ...]:
        return (self.total, *self.figures, self.divergence_N)

    def _add_gradient(self, grad_NV: Tensor, chunk_ND: Tensor, chunk: slice) -> None:
        of_hidden_ND, of_head_VD, of_head_V = self.gradients
        grad_RV = grad_NV.to(self.dtype)
        if of_hidden_ND is not None:
            of_hidden_ND[chunk] = (grad_RV @ self.head_VD).to(of_hidden_ND.dtype)
        if of_head_VD is not None:
            of_head_VD.add_(grad_RV.T @ chunk_ND)
        if of_head_V is not None:
            of_head_V.add_(grad_NV.sum(dim=0))
