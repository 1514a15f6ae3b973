"""A sorted corpus as a page: all rows as points, a list by suspicion, and pairs side by side.

A page holds the token heat maps of thousands of rows, so each is packed into few characters.
"""

# N = targets of a row

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup
from torch import Tensor

from yrunner.console import printable
from yrunner.data.conversation import TokenizedExample
from yrunner.data.dataset.quality import PairKind
from yrunner.reports.html import four_digits, render_page
from yrunner.reports.token_text import TokenText, pieces_of, top_texts
from yrunner.scoring.knn import NO_SUGGESTION, Lookup
from yrunner.scoring.measure import TokenScores
from yrunner.scoring.order import MARGIN, Mark, is_suspicious_when_low
from yrunner.scoring.rank import CROSS_FIT, KNN_SCORES
from yrunner.scoring.suspicious_spans import (
    CONFIDENT_ERROR,
    HARD,
    LUCKY,
    NORMAL,
    bounded,
    find_spans,
)
from yrunner.storage.run_dir import write_text
from yrunner.tokens import IGNORE_INDEX

PATTERNS = (NORMAL, LUCKY, HARD, CONFIDENT_ERROR)
"""The pattern that a target is part of; `patterns` of a row holds indices into this."""

KINDS = "0123456789abcdefghij"
"""One character per piece: its number of targets, plus 10 if it is a special token."""

SCRIPTS = (
    "heat_map.js",
    "sort_rows.js",
    "sort_marks.js",
    "sort_plots.js",
    "sort_list.js",
    "cluster_picture.js",
    "sort_clusters.js",
    "sort_page.js",
)
"""Joined into one script, in this order."""

SideKind = PairKind | Literal["contradiction"]
"""Why two rows stand side by side."""

SCALES = {
    "outlier": (0.5, 1.0, 2.0, 3.0, 5.0, 8.0),
    "unexplained": (0.05, 0.3, 1.0, 3.0, 5.0, 8.0),
    "knn_loss": (0.05, 0.3, 1.0, 2.0, 4.0, 8.0),
    "excess": (0.1, 0.5, 1.0, 2.0, 4.0, 8.0),
    "loss": (0.05, 0.3, 1.0, 2.0, 4.0, 8.0),
    "against": (0.02, 0.1, 0.3, 1.0, 3.0, 8.0),
    "entropy": (0.05, 0.3, 1.0, 2.0, 3.5, 5.0),
}
"""Borders between the colours of targets, in nats; of `outlier` in standard deviations."""

AGAINST = "against"
"""How much a target speaks against the order of a pair: summed, minus its margin."""

BETTER_THAN = "≻"
"""Between the answers of a pair."""

SHARES = (0.5, 0.8, 0.95, 0.99)
"""Borders between the colours of rows: the share of rows that are less suspicious."""


@dataclass(frozen=True)
class SortedRow:
    """A row of the corpus."""

    file: str
    number: int
    text: str
    """What the list shows, and the search looks at."""
    scores: Mapping[str, float]
    mean_loss: float
    """In nats per target."""
    mean_entropy: float
    num_targets: int
    dropped: str | None
    """Why the row is dropped from the sorted corpus; None where it is not."""
    heat_map: str | None
    """The row by `pack_tokens`; None where only its text is shown."""
    content: str
    """By which a saved mark knows its row."""
    mark: Mark | None = None


@dataclass(frozen=True)
class SideBySide:
    """A pair of rows to compare."""

    kind: SideKind
    rows: tuple[int, int]
    """Indices in `SortPage.rows`."""
    texts: tuple[str, str]
    likeness: float
    """From 0 to 1."""
    note: str = ""
    """Where they differ, shown in place of the likeness."""


@dataclass(frozen=True)
class PageCluster:
    """Rows that are about the same."""

    number: int
    """0 for the rows in no cluster."""
    size: int
    num_suspicious: int
    """Rows among the most suspicious tenth of the corpus."""
    words: Sequence[str]
    """That tell it from the others."""
    typical: Sequence[int]
    """Indices in `SortPage.rows`."""


@dataclass(frozen=True)
class PageClusters:
    """All rows in clusters."""

    numbers: Sequence[int]
    """The cluster of each row; 0: none."""
    plane: Sequence[tuple[float, float]]
    """Each row as a point."""
    clusters: Sequence[PageCluster]


@dataclass(frozen=True)
class SortPage:
    """What the page shows."""

    title: str
    score: str
    """The score that orders the corpus."""
    rows: Sequence[SortedRow]
    pairs: Sequence[SideBySide]
    num_pairs: Mapping[SideKind, int]
    """Number of pairs of each kind, including those that are not shown."""
    findings: Sequence[tuple[str, int, str]] = ()
    """Other findings: what, how often, and where first."""
    worst_and_sound: tuple[int, int] | None = None
    """A number of most suspicious rows, and how many of them are probably sound."""
    clusters: PageClusters | None = None


def write_sort_page(page: SortPage, path: Path) -> None:
    """Write the page; the file appears under its name only when it is complete."""
    write_text(path, render_sort_page(page))


def render_sort_page(page: SortPage) -> str:
    """The whole page as text."""
    names = _score_names(page)
    kinds = {name.removeprefix(CROSS_FIT) for name in names}
    coloured = kinds | {"excess", "loss", "entropy"} | ({AGAINST} if MARGIN in kinds else set())
    scales = {name: scale for name, scale in SCALES.items() if name in coloured}
    deciding = page.score.removeprefix(CROSS_FIT)
    coloured_by = AGAINST if deciding == MARGIN else deciding
    return render_page(
        "sort_page.html.jinja",
        scripts=SCRIPTS,
        page=page,
        scores=names,
        asks_others=not scales.keys().isdisjoint(KNN_SCORES),
        coloured_by=coloured_by if coloured_by in (*KNN_SCORES, AGAINST) else "excess",
        num_dropped=sum(row.dropped is not None for row in page.rows),
        num_targets=sum(row.num_targets for row in page.rows),
        num_maps=sum(row.heat_map is not None for row in page.rows),
        legends=scales,
        patterns=PATTERNS,
        shares=SHARES,
        figures={
            "scales": {figure: [borders, []] for figure, borders in scales.items()},
            "zones": PATTERNS,
            "examples": [],
        },
        rows=_harmless(json.dumps(_columns(page), ensure_ascii=False, separators=(",", ":"))),
        maps=_harmless("\n".join(row.heat_map or "" for row in page.rows)),
    )


def _columns(page: SortPage) -> dict[str, Any]:
    """The rows as columns, which are shorter; `file` has indices into `files`."""
    rows = page.rows
    names = list(dict.fromkeys(row.file for row in rows))
    places = {name: place for place, name in enumerate(names)}
    scores = _score_names(page)
    return {
        "score": page.score,
        "low": [name for name in scores if is_suspicious_when_low(name)],
        "shares": SHARES,
        "files": [printable(name) for name in names],
        "file": [places[row.file] for row in rows],
        "number": [row.number for row in rows],
        "text": [printable(row.text) for row in rows],
        "scores": {name: [four_digits(row.scores[name]) for row in rows] for name in scores},
        "loss": [four_digits(row.mean_loss) for row in rows],
        "entropy": [four_digits(row.mean_entropy) for row in rows],
        "targets": [row.num_targets for row in rows],
        "dropped": {place: printable(row.dropped) for place, row in enumerate(rows) if row.dropped},
        "content": [row.content for row in rows],
        "marks": {place: row.mark for place, row in enumerate(rows) if row.mark},
        "pairs": [
            {
                "kind": pair.kind,
                "rows": pair.rows,
                "texts": [printable(text) for text in pair.texts],
                "likeness": four_digits(pair.likeness),
                "note": printable(pair.note),
            }
            for pair in page.pairs
        ],
    } | (_cluster_columns(page.clusters) if page.clusters else {})


def _cluster_columns(found: PageClusters) -> dict[str, Any]:
    return {
        "cluster": list(found.numbers),
        "plane": [[four_digits(value) for value in point] for point in found.plane],
        "clusters": [
            {
                "number": cluster.number,
                "size": cluster.size,
                "suspicious": cluster.num_suspicious,
                "words": [printable(word) for word in cluster.words],
                "typical": list(cluster.typical),
            }
            for cluster in found.clusters
        ],
    }


def _score_names(page: SortPage) -> list[str]:
    return list(page.rows[0].scores) if page.rows else [page.score]


def _harmless(content: str) -> Markup:
    """JSON that cannot end the script element around it."""
    return Markup(content.replace("<", "\\u003c"))


@dataclass(frozen=True)
class TokensOfExample:
    """An example with what is shown of its targets."""

    example: TokenizedExample
    scores: TokenScores
    lookup: Lookup | None = None
    deviation_N: Tensor | None = None
    against_N: Tensor | None = None


def pack_tokens(row: Sequence[TokensOfExample], text: TokenText) -> str:
    """A row as one line of JSON, for sort_page.js: an example, or the answers of a pair.

    `texts` and `kinds` are the pieces of the row. `loss` and `entropy` are in hundredths of a nat.
    `top` has the model's top prediction by target index, where it is not the target. `knn_loss` and
    `told` of a lookup are the loss and the prediction by its nearest rows. `outlier` has
    `deviation_N` in hundredths of a standard deviation, `against` has `against_N` in those of a
    nat. The prompt of a second answer is left out.
    """
    content, *others = [_content(each, text) for each in row]
    for other in others:
        targets = len(content["loss"])
        start = next(place for place, kind in enumerate(other["kinds"]) if int(kind, 20) % 10)
        content["texts"] += [f"\n{BETTER_THAN}\n", *other["texts"][start:]]
        content["kinds"] += KINDS[10] + other["kinds"][start:]
        content["top"] |= {targets + place: top for place, top in other["top"].items()}
        content["patterns"] += other["patterns"]
        for figure in ("loss", "entropy", AGAINST):
            content[figure] += other[figure]
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def _content(shown: TokensOfExample, text: TokenText) -> dict[str, Any]:
    """The content of `pack_tokens` for one example."""
    example, scores, lookup = shown.example, shown.scores, shown.lookup
    pieces = pieces_of(example, text)
    loss_N, entropy_N = bounded(scores.loss_N, scores.entropy_N)
    targets = [label for label in example.labels if label != IGNORE_INDEX]
    tops = scores.top_N.tolist()
    told = top_texts(example, tops, text)
    content = {
        "texts": [piece.text for piece in pieces],
        "kinds": "".join(KINDS[piece.num_targets + 10 * piece.is_special] for piece in pieces),
        "loss": _hundredths(loss_N),
        "entropy": _hundredths(entropy_N),
        "patterns": "".join(
            str(PATTERNS.index(span.pattern)) * (span.end - span.start)
            for span in find_spans(loss_N, entropy_N)
        ),
        "top": {
            place: told[place] for place, target in enumerate(targets) if tops[place] != target
        },
    }
    if lookup is not None:
        suggested_N = lookup.suggested_N.tolist()
        instead = top_texts(example, [max(0, id_) for id_ in suggested_N], text)
        content["knn_loss"] = _hundredths(bounded(lookup.loss_N, entropy_N)[0])
        content["told"] = {
            place: instead[place] for place, id_ in enumerate(suggested_N) if id_ != NO_SUGGESTION
        }
    if shown.deviation_N is not None:
        content["outlier"] = _hundredths(shown.deviation_N)
    if shown.against_N is not None:
        content[AGAINST] = _hundredths(shown.against_N)
    return content


def _hundredths(figure_N: Tensor) -> list[int]:
    return [round(100 * value) for value in figure_N.tolist()]
