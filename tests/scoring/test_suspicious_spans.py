"""Spans of a row, against windows and deviations computed target by target."""

import math
import statistics
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from yrunner.scoring.suspicious_spans import (
    FAR,
    FEWEST_NATS,
    SuspiciousSpan,
    find_spans,
    worst_span,
)

figures = st.one_of(st.floats(0, 15, width=32), st.sampled_from([math.inf, math.nan]))
rows = st.lists(st.tuples(figures, figures), max_size=15)
sound_rows = st.lists(st.tuples(st.floats(0, 15), st.floats(0, 10)), min_size=1, max_size=15)
LOW, HIGH = 0.1, 6.0


def spans_of(losses: list[float], entropies: list[float]) -> list[SuspiciousSpan]:
    return find_spans(torch.tensor(losses), torch.tensor(entropies))


def slow_deviations(figures: list[float]) -> list[float]:
    """Of every target's window, in standard deviations from the row's mean."""
    windows = [figures[max(0, place - 1) : place + 2] for place in range(len(figures))]
    means = [statistics.fmean(window) for window in windows]
    deviation = max(FEWEST_NATS, statistics.pstdev(means))
    return [(mean - statistics.fmean(means)) / deviation for mean in means]


def slow_pattern(loss: float, entropy: float) -> str:
    if loss > FAR and entropy < -FAR:
        return "confident error"
    if loss > FAR and entropy > FAR:
        return "hard"
    return "lucky" if loss < -FAR and entropy > FAR else "normal"


@given(sound_rows)
def test_spans_are_those_found_target_by_target(row: list[tuple[float, float]]):
    pairs_N2 = torch.tensor(row, dtype=torch.float64)
    losses, entropies = (slow_deviations(column.tolist()) for column in pairs_N2.T)
    # On the border rounding decides.
    assume(all(abs(abs(one) - FAR) > 1e-9 for one in (*losses, *entropies)))
    patterns = [slow_pattern(*pair) for pair in zip(losses, entropies, strict=True)]
    spans = find_spans(pairs_N2[:, 0], pairs_N2[:, 1])
    assert [span.pattern for span in spans for _ in range(span.start, span.end)] == patterns
    for span in spans:
        strength = max(
            abs(losses[place]) + abs(entropies[place]) for place in range(span.start, span.end)
        )
        assert span.strength == pytest.approx(0 if span.pattern == "normal" else strength)


@given(rows)
def test_spans_cover_every_row_once_and_have_finite_strengths(row: list[tuple[float, float]]):
    spans = spans_of([loss for loss, _ in row], [entropy for _, entropy in row])
    covered = [place for span in spans for place in range(span.start, span.end)]
    assert covered == list(range(len(row)))
    assert all(before.pattern != after.pattern for before, after in pairwise(spans))
    assert all(math.isfinite(span.strength) and span.strength >= 0 for span in spans)


@pytest.mark.parametrize(
    ("loss", "entropy", "pattern"),
    [
        (HIGH, LOW, "confident error"),
        (HIGH, HIGH, "hard"),
        (LOW, HIGH, "lucky"),
        (LOW, LOW, "normal"),
    ],
)
def test_patterns_are_named_by_what_is_up_and_what_is_down(
    loss: float, entropy: float, pattern: str
):
    # Around the stretch both are in between, so that up and down are seen.
    middle, size = [3.0] * 8, 4
    losses = [*middle, *[loss] * size, *middle, *[HIGH + LOW - loss] * size, *middle]
    entropies = [*middle, *[entropy] * size, *middle, *[HIGH + LOW - entropy] * size, *middle]
    inside = [span.pattern for span in spans_of(losses, entropies) if span.start <= 9 < span.end]
    assert inside == [pattern]


def test_the_worst_span_is_where_the_model_was_sure_and_wrong():
    losses = [0.2] * 5 + [2.0] * 3 + [0.2] * 5 + [9.0] * 3 + [0.2] * 5
    entropies = [2.0] * 5 + [0.1] * 3 + [2.0] * 5 + [0.1] * 3 + [2.0] * 5
    span = worst_span(torch.tensor(losses), torch.tensor(entropies))
    assert span is not None
    assert span.pattern == "confident error" and span.start <= 14 < span.end
    assert 13 - 1 <= span.start and span.end <= 16 + 1
    assert span.strength > 2 * FAR


@pytest.mark.parametrize(
    ("losses", "entropies"),
    [
        ([], []),
        ([12.0], [0.0]),
        ([2.0] * 6, [1.0] * 6),
        ([0.01, 0.02, 0.03, 0.0, 0.01], [0.03, 0.01, 0.0, 0.04, 0.03]),
    ],
    ids=["empty", "one token", "constant", "mastered"],
)
def test_nothing_stands_out_of_a_row_without_shape(losses: list[float], entropies: list[float]):
    assert worst_span(torch.tensor(losses), torch.tensor(entropies)) is None
    assert all(span.pattern == "normal" for span in spans_of(losses, entropies))


def test_of_equal_spans_the_first_is_the_worst():
    losses, entropies = [1.0, 9.0, 9.0, 9.0, 1.0] * 2, [3.0, 0.0, 0.0, 0.0, 3.0] * 2
    span = worst_span(torch.tensor(losses), torch.tensor(entropies))
    assert span is not None and span.end <= 5
