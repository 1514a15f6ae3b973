"""The rows that `yrun sort` scores: their examples, scores, worst span and decision."""

# N = targets of a row

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from yrunner.commands.sort.write import RowPlace
from yrunner.data.dataset.examples import Examples
from yrunner.errors import Origin, YRunnerError
from yrunner.recipe.schema.sort import SortSection
from yrunner.reports.token_text import INCOMPLETE, LINE_END, MOST_TOKENS_OF_A_CHARACTER, TokenText
from yrunner.reports.token_view import CLOSED, OPENED
from yrunner.scoring.clusters import Clusters
from yrunner.scoring.knn import Lookup
from yrunner.scoring.measure import TokenScores
from yrunner.scoring.order import (
    MARGIN,
    NO_CLUSTER,
    Dropped,
    Mark,
    choose_dropped,
    order_rows,
    suspicion,
)
from yrunner.scoring.questions import Contradiction
from yrunner.scoring.rank import (
    CROSS_FIT,
    KNN_LOSS,
    OUTLIER,
    UNEXPLAINED,
    Neighbourhood,
    score_row,
    unexplained_losses,
)
from yrunner.scoring.suspicious_spans import SuspiciousSpan, worst_span, worst_stretch

SHOWN_CHARACTERS = 24
"""Shown on each side of a span."""
LONGEST_SPAN = 80
"""Characters of the span itself."""


@dataclass(frozen=True)
class CorpusRow:
    """A row of the training files."""

    place: RowPlace
    origin: Origin
    examples: range
    """Indices of its examples: several for a long text that is split, and for a pair."""


@dataclass(frozen=True)
class Seen:
    """The models' scores of the targets of every example."""

    base: Sequence[TokenScores]
    lookups: Sequence[Lookup] | None
    """kNN lookups; None if no score needs them."""
    crossed: Sequence[TokenScores] | None
    """By models trained on other rows; None without cross-fitting."""
    deviations: Sequence[Tensor] | None = None
    """How far each target of an example is above similar places, see `outlier_targets`, and what
    its contradictions add."""
    crossed_deviations: Sequence[Tensor] | None = None
    """The same as `deviations`, with the losses of those models."""
    contradictions: Mapping[int, Contradiction] = field(default_factory=dict)
    """By the index of the example."""
    against: Sequence[Tensor] | None = None
    """How much each target speaks against its row, see pairs.py; None unless pairs are sorted."""
    crossed_against: Sequence[Tensor] | None = None
    """The same as `against`, by those models."""

    @property
    def best(self) -> Sequence[TokenScores]:
        """By the cross-fitted models, if any."""
        return self.crossed or self.base

    @property
    def best_deviations(self) -> Sequence[Tensor] | None:
        """Those of `best`."""
        return self.crossed_deviations or self.deviations

    @property
    def best_against(self) -> Sequence[Tensor] | None:
        """Those of `best`."""
        return self.crossed_against or self.against


@dataclass(frozen=True)
class Verdict:
    """The scores of a row."""

    scores: dict[str, float]
    """By the base."""
    cross_fit: dict[str, float] | None
    """By a model trained on other rows; None without cross-fitting."""
    num_targets: int
    worst: SuspiciousSpan | None
    """Among the row's targets, by the deciding score."""

    def named_scores(self) -> dict[str, float]:
        """All scores; those of cross-fitted models are named `cross-fit loss`."""
        crossed = self.cross_fit or {}
        return self.scores | {f"{CROSS_FIT}{kind}": value for kind, value in crossed.items()}


@dataclass(frozen=True)
class Decision:
    """Which rows are kept and dropped, by index."""

    order: list[int]
    """The kept rows in their new order."""
    dropped: list[Dropped]
    """The dropped rows, most suspicious first."""


def corpus_rows(examples: Examples) -> list[CorpusRow]:
    """The rows of the examples, in order."""
    files, numbers = examples.file_E.tolist(), examples.column("rows").tolist()
    places = list(zip(files, numbers, strict=True))
    rows = []
    for place, group in groupby(range(len(places)), places.__getitem__):
        first, *others = group
        rows.append(CorpusRow(place, examples.origin(first), range(first, first + 1 + len(others))))
    return rows


def deciding_score(section: SortSection) -> str:
    """The score that orders and drops: of the cross-fitted models, if any."""
    by_cross_fit = section.cross_fit and section.deciding != KNN_LOSS
    return f"{CROSS_FIT}{section.deciding}" if by_cross_fit else section.deciding


def judge(row: CorpusRow, seen: Seen, section: SortSection) -> Verdict:
    """Score a row by the tokens of all its examples."""
    if seen.best_against is not None:
        return _judge_answers(row, seen)
    loss_N, entropy_N = _figures(row, seen.base)
    near = _neighbourhood(row, seen, seen.deviations)
    scores = score_row(loss_N, entropy_N, section.kinds, near)
    cross_fit = None
    if seen.crossed is not None:
        loss_N, entropy_N = _figures(row, seen.crossed)
        near = _neighbourhood(row, seen, seen.crossed_deviations)
        cross_fit = score_row(loss_N, entropy_N, section.crossed_kinds, near)
    worst = _worst(section.deciding, loss_N, entropy_N, near)
    return Verdict(scores, cross_fit, len(loss_N), worst)


def _judge_answers(row: CorpusRow, seen: Seen) -> Verdict:
    """Score a pair, or a marked answer."""
    by_base, by_tuned = (
        None if each is None else {MARGIN: -sum(float(each[place].sum()) for place in row.examples)}
        for each in (seen.against, seen.crossed_against)
    )
    assert by_base is not None and seen.best_against is not None, "pairs have been compared"
    start, spans = 0, []
    for place in row.examples:
        against_N = seen.best_against[place]
        span = worst_stretch(against_N)
        if span is not None:
            spans.append(replace(span, start=span.start + start, end=span.end + start))
        start += len(against_N)
    worst = max(spans, key=lambda span: span.strength, default=None)
    return Verdict(by_base, by_tuned, start, worst)


def _worst(
    deciding: str, loss_N: Tensor, entropy_N: Tensor, near: Neighbourhood | None
) -> SuspiciousSpan | None:
    """The worst span by the deciding score."""
    if near is not None and deciding == OUTLIER:
        return worst_stretch(near.deviation_N)
    if near is not None and deciding == KNN_LOSS:
        return worst_stretch(near.knn_loss_N)
    if near is not None and deciding == UNEXPLAINED:
        return worst_stretch(unexplained_losses(loss_N, near.knn_loss_N))
    return worst_span(loss_N, entropy_N)


def decide(
    section: SortSection,
    scores: Sequence[float],
    marks: Mapping[int, Mark],
    seed: int,
    clusters: Clusters | None = None,
) -> Decision:
    """Drop and order rows by the deciding score. Raises `YRunnerError` if none is left."""
    name = deciding_score(section)
    dropped = choose_dropped(
        name,
        scores,
        drop_share=section.drop_share,
        drop_above=section.drop_above,
        drop_below=section.drop_below,
        keep=section.keep,
        marks=marks,
        clusters=clusters.numbers if clusters else [NO_CLUSTER] * len(scores),
        keep_of_each=section.clusters.keep,
    )
    gone = {row.index for row in dropped}
    kept = [index for index in range(len(scores)) if index not in gone]
    if not kept:
        raise YRunnerError(
            f"every row is dropped: each {name} is between {min(scores):.4g} and {max(scores):.4g}",
            remedy="change sort.drop_share, sort.drop_above or sort.drop_below to keep some rows",
        )
    values = [scores[index] for index in kept]
    if section.order == "blocks":
        # From easy to hard, which is from high to low for some scores.
        values = [suspicion(name, value) for value in values]
    order = order_rows(values, section.order, seed=seed, blocks=section.blocks)
    return Decision([kept[index] for index in order], dropped)


def _figures(row: CorpusRow, scores: Sequence[TokenScores]) -> tuple[Tensor, Tensor]:
    return _joined(row, scores, "loss_N"), _joined(row, scores, "entropy_N")


def _neighbourhood(
    row: CorpusRow, seen: Seen, deviations: Sequence[Tensor] | None
) -> Neighbourhood | None:
    if seen.lookups is None or deviations is None:
        return None
    deviation_N = torch.cat([deviations[place] for place in row.examples])
    return Neighbourhood(_joined(row, seen.lookups, "loss_N"), deviation_N)


def _joined(row: CorpusRow, parts: Sequence[TokenScores | Lookup], figure: str) -> Tensor:
    return torch.cat([getattr(parts[place], figure) for place in row.examples])


@dataclass(frozen=True)
class MarkedSpan:
    """A span of a row's targets and its context."""

    before: str
    marked: str
    after: str

    def line(self) -> str:
        """One line with the span in brackets, shortened at both ends."""
        before, after = self.before[-SHOWN_CHARACTERS:], self.after[:SHOWN_CHARACTERS]
        if len(before) < len(self.before):
            before = f"…{before}"
        if len(after) < len(self.after):
            after = f"{after}…"
        marked = self.marked
        if len(marked) > LONGEST_SPAN:
            marked = f"{marked[:LONGEST_SPAN]}…"
        return f"{before}{OPENED}{marked}{CLOSED}{after}".replace("\n", LINE_END)


def mark_span(
    row: CorpusRow, span: SuspiciousSpan, examples: Examples, text: TokenText
) -> MarkedSpan:
    """The targets of the row with the span marked, extended to whole characters."""
    ids: list[int] = []
    for place in row.examples:
        example = examples[place]
        ids += [example.labels[position] for position in example.target_positions]
    start = _whole(ids, span.start, -1, text)
    end = _whole(ids, span.end, 1, text)
    before, marked, after = ids[:start], ids[start:end], ids[end:]
    return MarkedSpan(
        text.decode(before), text.decode(marked, before), text.decode(after, ids[:end])
    )


def _whole(ids: Sequence[int], border: int, step: int, text: TokenText) -> int:
    """The nearest border between two characters, or the border itself."""
    for moved in range(MOST_TOKENS_OF_A_CHARACTER):
        place = border + step * moved
        if place in (0, len(ids)) or not text.decode(ids[:place]).endswith(INCOMPLETE):
            return place
    return border
