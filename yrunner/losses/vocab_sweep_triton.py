"""`vocab_sweep.sweep` as one GPU kernel: reads the logits twice, writes once, in place.

Only the logits have the size of targets times vocabulary, in the dtype of the computation;
statistics are computed in float32. For Triton 3, which comes with torch's CUDA build.
"""

# N = targets of a chunk, V = vocabulary

import torch
import triton
import triton.language as tl
from torch import Tensor

from yrunner.losses.vocab_sweep import LogitForm, VocabStats

LARGEST_BLOCK = 8192
"""Logits per step of a program."""


def sweep_on_gpu(logits_NV: Tensor, labels_N: Tensor, form: LogitForm) -> tuple[VocabStats, Tensor]:
    """Statistics of raw logits, and the gradient before the cap, which overwrites the logits.

    `logits_NV`: the contiguous product of hidden states and head.
    """
    assert logits_NV.is_contiguous()
    num_rows, vocabulary_size = logits_NV.shape
    stats = [logits_NV.new_empty(num_rows, dtype=torch.float32) for _ in range(7)]
    block = min(LARGEST_BLOCK, triton.next_power_of_2(vocabulary_size))
    _sweep[(num_rows,)](
        logits_NV,
        labels_N,
        *stats,
        vocabulary_size,
        form.scale,
        form.softcap or 0.0,
        IS_CAPPED=form.softcap is not None,
        BLOCK=block,
        num_warps=16 if block == LARGEST_BLOCK else 4,
    )
    return VocabStats(*stats), logits_NV


@triton.jit  # type: ignore[untyped-decorator]
def _final(logit, scale, softcap, IS_CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    logit = logit.to(tl.float32) * scale
    if IS_CAPPED:
        # tanh from the sigmoid, which every version of Triton has.
        logit = softcap * (2 * tl.sigmoid(2 * logit / softcap) - 1)
    return logit


@triton.jit  # type: ignore[untyped-decorator]
def _sweep(  # type: ignore[no-untyped-def]
    logits,
    labels,
    losses,
    label_logits,
    top_logits,
    log_sums,
    hits,
    norms,
    means,
    vocabulary_size,
    scale,
    softcap,
    IS_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    first = logits + row.to(tl.int64) * vocabulary_size
    label = tl.load(labels + row)
    label_logit = _final(tl.load(first + label), scale, softcap, IS_CAPPED)

    # Running sums of exp(logit - top); rescaled when a higher top appears.
    top = -float("inf")
    total = 0.0
    total_logits = 0.0
    total_squares = 0.0
    for start in range(0, vocabulary_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary_size
        logit = tl.load(first + columns, mask=inside, other=0.0)
        logit = _final(logit, scale, softcap, IS_CAPPED)
        higher = tl.maximum(top, tl.max(tl.where(inside, logit, -float("inf")), 0))
        shrink = tl.exp(top - higher)
        power = tl.where(inside, tl.exp(logit - higher), 0.0)
        total = total * shrink + tl.sum(power, 0)
        total_logits = total_logits * shrink + tl.sum(power * logit, 0)
        # Without the label, whose share would swamp the rest of a mastered token.
        others = tl.where(columns == label, 0.0, power)
        total_squares = total_squares * shrink * shrink + tl.sum(others * others, 0)
        top = higher

    log_sum = tl.log(total)
    loss = (top - label_logit) + log_sum
    missing = 1 - tl.exp(-loss)
    tl.store(losses + row, loss)
    tl.store(label_logits + row, label_logit)
    tl.store(top_logits + row, top)
    tl.store(log_sums + row, log_sum)
    tl.store(hits + row, (label_logit >= top).to(tl.float32))
    tl.store(norms + row, tl.sqrt(total_squares / (total * total) + missing * missing))
    tl.store(means + row, total_logits / total)

    for start in range(0, vocabulary_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary_size
        logit = tl.load(first + columns, mask=inside, other=0.0)
        logit = _final(logit, scale, softcap, IS_CAPPED)
        grad = tl.exp(logit - top) / total - tl.where(columns == label, 1.0, 0.0)
        if IS_CAPPED:
            share = logit / softcap
            grad = grad * (1 - share * share)
        tl.store(first + columns, grad.to(logits.dtype.element_ty), mask=inside)
