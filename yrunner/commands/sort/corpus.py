"""The rows that `yrun sort` judges: what each is made of, its scores, its new place or its end.

The worst span of a row as text, with what stands around it.
"""

# N = targets of a row

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from yrunner.commands.sort.write import RowPlace
from yrunner.data.dataset.examples import Examples
from yrunner.errors import Origin, YRunnerError
from yrunner.recipe.schema.sort import SortSection
from yrunner.reports.token_text import INCOMPLETE, LINE_END, MOST_TOKENS_OF_A_CHARACTER, TokenText
from yrunner.reports.token_view import CLOSED, OPENED
from yrunner.scoring.knn import Lookup
from yrunner.scoring.measure import TokenScores
from yrunner.scoring.rank import (
    CROSS_FIT,
    KNN_LOSS,
    UNEXPLAINED,
    Dropped,
    choose_dropped,
    order_rows,
    score_row,
    suspicion,
    unexplained_losses,
)
from yrunner.scoring.suspicious_spans import SuspiciousSpan, worst_span, worst_stretch


@dataclass(frozen=True)
class CorpusRow:
    """A row of the training files that is learned from."""

    place: RowPlace
    origin: Origin
    examples: range
    """Its places among the examples: more than one where a long text is split."""


@dataclass(frozen=True)
class Seen:
    """What models make of the targets of every example."""

    base: Sequence[TokenScores]
    lookups: Sequence[Lookup] | None
    """What the base remembers of other rows; None where no score asks for it."""
    crossed: Sequence[TokenScores] | None
    """By models that have learned from other rows; None where there are none."""

    @property
    def best(self) -> Sequence[TokenScores]:
        """By the models that know the field, if there are."""
        return self.crossed or self.base


@dataclass(frozen=True)
class Verdict:
    """What the models make of a row."""

    scores: dict[str, float]
    """By the base."""
    cross_fit: dict[str, float] | None
    """By a model that was trained on other rows; None where none was."""
    num_targets: int
    worst: SuspiciousSpan | None
    """Over the targets of the row, by what decides."""

    def named_scores(self) -> dict[str, float]:
        """All of them; those of the other models are called `cross-fit loss`."""
        crossed = self.cross_fit or {}
        return self.scores | {f"{CROSS_FIT}{kind}": value for kind, value in crossed.items()}


@dataclass(frozen=True)
class Decision:
    """What becomes of the rows, by their indices."""

    order: list[int]
    """The rows that are kept, in their new order."""
    dropped: list[Dropped]
    """The others, the most suspicious first."""


def corpus_rows(examples: Examples) -> list[CorpusRow]:
    """The rows of the examples, in their order."""
    files, numbers = examples.file_E.tolist(), examples.column("rows").tolist()
    places = list(zip(files, numbers, strict=True))
    rows = []
    for place, group in groupby(range(len(places)), places.__getitem__):
        first, *others = group
        rows.append(CorpusRow(place, examples.origin(first), range(first, first + 1 + len(others))))
    return rows


def deciding_score(section: SortSection) -> str:
    """The name of the score that orders and drops: by models that know the field, if there are."""
    by_cross_fit = section.cross_fit and section.deciding != KNN_LOSS
    return f"{CROSS_FIT}{section.deciding}" if by_cross_fit else section.deciding


def judge(row: CorpusRow, seen: Seen, section: SortSection) -> Verdict:
    """Score a row by the scores of the tokens of all its examples."""
    loss_N, entropy_N = _figures(row, seen.base)
    knn_loss_N = None if seen.lookups is None else _joined(row, seen.lookups, "loss_N")
    scores = score_row(loss_N, entropy_N, section.kinds, knn_loss_N)
    cross_fit = None
    if seen.crossed is not None:
        loss_N, entropy_N = _figures(row, seen.crossed)
        cross_fit = score_row(loss_N, entropy_N, section.crossed_kinds, knn_loss_N)
    if section.deciding == KNN_LOSS and knn_loss_N is not None:
        worst = worst_stretch(knn_loss_N)
    elif section.deciding == UNEXPLAINED and knn_loss_N is not None:
        worst = worst_stretch(unexplained_losses(loss_N, knn_loss_N))
    else:
        worst = worst_span(loss_N, entropy_N)
    return Verdict(scores, cross_fit, len(loss_N), worst)


def decide(section: SortSection, scores: Sequence[float], seed: int) -> Decision:
    """Drop and order rows by the score that decides. Raises `YRunnerError` where none is left."""
    name = deciding_score(section)
    dropped = choose_dropped(
        name,
        scores,
        drop_share=section.drop_share,
        drop_above=section.drop_above,
        drop_below=section.drop_below,
        keep=section.keep,
    )
    gone = {row.index for row in dropped}
    kept = [index for index in range(len(scores)) if index not in gone]
    if not kept:
        raise YRunnerError(
            f"every row is dropped: each {name} lies between {min(scores):.4g} and "
            f"{max(scores):.4g}",
            remedy="set sort.drop_share, sort.drop_above and sort.drop_below so that rows are left",
        )
    values = [scores[index] for index in kept]
    if section.order == "blocks":
        # From easy to hard, which for some scores is from high to low.
        values = [suspicion(name, value) for value in values]
    order = order_rows(values, section.order, seed=seed, blocks=section.blocks)
    return Decision([kept[index] for index in order], dropped)


def _figures(row: CorpusRow, scores: Sequence[TokenScores]) -> tuple[Tensor, Tensor]:
    return _joined(row, scores, "loss_N"), _joined(row, scores, "entropy_N")


def _joined(row: CorpusRow, parts: Sequence[TokenScores | Lookup], figure: str) -> Tensor:
    return torch.cat([getattr(parts[place], figure) for place in row.examples])


SHOWN_CHARACTERS = 24
"""What is shown on each side of a span."""
LONGEST_SPAN = 80
"""Characters of the span itself."""


@dataclass(frozen=True)
class MarkedSpan:
    """A stretch of what is learned from a row, and its surroundings."""

    before: str
    marked: str
    after: str

    def line(self) -> str:
        """All on one line, the stretch in brackets, the far ends left out."""
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
    """The targets of the row with the span marked, grown to whole characters."""
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
    """The next border that lies between two characters; the border itself where there is none."""
    for moved in range(MOST_TOKENS_OF_A_CHARACTER):
        place = border + step * moved
        if place in (0, len(ids)) or not text.decode(ids[:place]).endswith(INCOMPLETE):
            return place
    return border
