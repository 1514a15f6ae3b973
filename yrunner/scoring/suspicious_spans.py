"""Spans of a row where loss and entropy disagree: sure and wrong, unsure and wrong, lucky."""

# N = target tokens

from dataclasses import dataclass
from itertools import groupby

from torch import Tensor
from torch.nn.functional import avg_pool1d

MOST_NATS = 100.0
"""Upper bound of a loss: float32 cannot tell its probability from 0."""
WINDOW = 3
"""Targets averaged before comparing: one odd token is not a span."""
FEWEST_NATS = 0.1
"""Smallest standard deviation to divide by: less variation within a row is noise."""
FAR = 0.6
"""Standard deviations from the row's mean beyond which a figure is high or low, as published."""

SURPRISING_LOSS = 3.0
"""Loss in nats above which a target is a surprise: its probability was below one in twenty."""

CONFIDENT_ERROR, HARD, LUCKY, NORMAL = "confident error", "hard", "lucky", "normal"
UNHEARD = "unheard of"
"""A span that neither the model nor similar contexts in other rows predict."""
PATTERNS = {(1, -1): CONFIDENT_ERROR, (1, 1): HARD, (-1, 1): LUCKY}
"""By loss and entropy: 1 high, -1 low, 0 near the mean. All others are normal."""


@dataclass(frozen=True)
class SuspiciousSpan:
    """Consecutive targets with one pattern."""

    start: int
    """Index of the first target, among the targets of the row."""
    end: int
    """Index after the last."""
    pattern: str
    """confident error, hard, lucky, normal or unheard of."""
    strength: float
    """Largest deviation of loss plus entropy from their means, in standard deviations; 0 if normal.
    If unheard of: the sum of its losses in nats."""


def find_spans(loss_N: Tensor, entropy_N: Tensor) -> list[SuspiciousSpan]:
    """Split the row into spans, from its first target to its last; none if it has no targets.

    Loss and entropy in nats are averaged over a window of 3 and measured in standard deviations
    from the row's means: a span stands out from its row, not from the corpus.
    """
    if not len(loss_N):
        return []
    loss_N, entropy_N = (_standardize(_smooth(figure_N)) for figure_N in bounded(loss_N, entropy_N))
    strength_N = loss_N.abs() + entropy_N.abs()
    sides = zip(_sides(loss_N), _sides(entropy_N), strict=True)
    patterns = [PATTERNS.get(pair, NORMAL) for pair in sides]
    spans, start = [], 0
    for pattern, group in groupby(patterns):
        end = start + len(list(group))
        strength = 0.0 if pattern == NORMAL else strength_N[start:end].max().item()
        spans.append(SuspiciousSpan(start, end, pattern, strength))
        start = end
    return spans


def worst_span(loss_N: Tensor, entropy_N: Tensor) -> SuspiciousSpan | None:
    """The strongest confident error, the first of equals; None if there is none."""
    errors = [span for span in find_spans(loss_N, entropy_N) if span.pattern == CONFIDENT_ERROR]
    return max(errors, key=lambda span: span.strength, default=None)


def worst_stretch(loss_N: Tensor) -> SuspiciousSpan | None:
    """The run of targets with losses above 3 whose sum is largest, the first of equals.

    `loss_N` takes other rows into account, see knn.py. None if no loss is above 3.
    """
    loss_N = bounded_loss(loss_N)
    stretches, start = [], 0
    for is_surprise, group in groupby((loss_N > SURPRISING_LOSS).tolist()):
        end = start + len(list(group))
        if is_surprise:
            stretches.append(SuspiciousSpan(start, end, UNHEARD, loss_N[start:end].sum().item()))
        start = end
    return max(stretches, key=lambda span: span.strength, default=None)


def bounded(loss_N: Tensor, entropy_N: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 and finite, so that every score is a number.

    Losses are clamped to 0 to 100 nats; NaN counts 100. An entropy that is not finite counts 0.
    """
    return bounded_loss(loss_N), entropy_N.double().nan_to_num(0, posinf=0).clamp(0, MOST_NATS)


def bounded_loss(loss_N: Tensor) -> Tensor:
    """The loss as in `bounded`."""
    return loss_N.double().nan_to_num(MOST_NATS).clamp(0, MOST_NATS)


def _smooth(figure_N: Tensor) -> Tensor:
    """The mean of each target and its neighbours; fewer of them at the ends."""
    pooled_1N = avg_pool1d(
        figure_N[None], WINDOW, stride=1, padding=WINDOW // 2, count_include_pad=False
    )
    return pooled_1N[0]


def _standardize(figure_N: Tensor) -> Tensor:
    """Standard deviations from the row's mean."""
    return (figure_N - figure_N.mean()) / figure_N.std(correction=0).clamp(min=FEWEST_NATS)


def _sides(figure_N: Tensor) -> list[int]:
    return ((figure_N > FAR).int() - (figure_N < -FAR).int()).tolist()
