"""A sorted corpus as a page: all rows as points, the suspicious ones first, and twins side by side.

The page is one file and asks for nothing. Its one script is named by its hash, so that a browser
runs no other, whatever the data holds.

The token heat map of one row of a sorted corpus, in few characters: thousands share a page.
"""

# N = targets of the row

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup
from torch import Tensor

from yrunner.console import printable
from yrunner.data.conversation import TokenizedExample
from yrunner.data.dataset.quality import PairKind
from yrunner.reports.html import render_page
from yrunner.reports.token_text import TokenText, pieces_of, top_texts
from yrunner.scoring.knn import NOTHING, Lookup
from yrunner.scoring.measure import TokenScores
from yrunner.scoring.rank import ASKING_OTHERS, CROSS_FIT, is_suspicious_when_low
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
"""What a target is part of; `patterns` of a row holds places in this list."""

KINDS = "0123456789abcdefghij"
"""The sign of a piece: how many targets it is, by digits, or by letters for special tokens."""


def pack_tokens(
    example: TokenizedExample, scores: TokenScores, text: TokenText, lookup: Lookup | None = None
) -> str:
    """A row as one line of JSON, for sort_page.js.

    `texts` and `kinds` are the pieces of the row. `loss` and `entropy` are in hundredths of a nat,
    `top` has what the model would have said where that is something else, by the target's place. Of
    a `lookup`, `knn_loss` and `told` are what other rows make of it.
    """
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
        told_N = lookup.told_N.tolist()
        instead = top_texts(example, [max(0, id_) for id_ in told_N], text)
        content["knn_loss"] = _hundredths(bounded(lookup.loss_N, entropy_N)[0])
        content["told"] = {
            place: instead[place] for place, id_ in enumerate(told_N) if id_ != NOTHING
        }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def _hundredths(figure_N: Tensor) -> list[int]:
    return [round(100 * value) for value in figure_N.tolist()]


SCRIPTS = ("heat_map.js", "sort_rows.js", "sort_plots.js", "sort_list.js", "sort_page.js")
"""They are one script on the page, in this order."""

SCALES = {
    "unexplained": (0.05, 0.3, 1.0, 3.0, 5.0, 8.0),
    "knn_loss": (0.05, 0.3, 1.0, 2.0, 4.0, 8.0),
    "excess": (0.1, 0.5, 1.0, 2.0, 4.0, 8.0),
    "loss": (0.05, 0.3, 1.0, 2.0, 4.0, 8.0),
    "entropy": (0.05, 0.3, 1.0, 2.0, 3.5, 5.0),
}
"""Where a colour of a target ends and the next begins, in nats."""

SHARES = (0.5, 0.8, 0.95, 0.99)
"""Where a colour of a row ends: the share of all rows that are less suspicious."""


@dataclass(frozen=True)
class SortedRow:
    """A row of the corpus, as the page shows it."""

    file: str
    number: int
    text: str
    """What is seen of the row in the list, and searched."""
    scores: Mapping[str, float]
    mean_loss: float
    """In nats per target."""
    mean_entropy: float
    num_targets: int
    dropped: str | None
    """Why the row is left out of the sorted corpus; None where it is not."""
    heat_map: str | None
    """What `pack_tokens` made of it; None opens the row with its text alone."""


@dataclass(frozen=True)
class SideBySide:
    """Two rows that a person should compare."""

    kind: PairKind
    rows: tuple[int, int]
    """Their places in `SortPage.rows`."""
    texts: tuple[str, str]
    likeness: float
    """From 0 to 1."""


@dataclass(frozen=True)
class SortPage:
    """What the page shows."""

    title: str
    score: str
    """The score that orders the corpus."""
    rows: Sequence[SortedRow]
    pairs: Sequence[SideBySide]
    num_pairs: Mapping[PairKind, int]
    """How many there are of each kind, those included that are not shown."""
    findings: Sequence[tuple[str, int, str]] = ()
    """What else stands out: what it is, how often, and the first places."""


def write_sort_page(page: SortPage, path: Path) -> None:
    """Write the page; the file appears under its name only when it is complete."""
    write_text(path, render_sort_page(page))


def render_sort_page(page: SortPage) -> str:
    """The whole page as text."""
    folder = files("yrunner.reports")
    names = _score_names(page)
    kinds = {name.removeprefix(CROSS_FIT) for name in names}
    scales = {
        name: scale for name, scale in SCALES.items() if name not in ASKING_OTHERS or name in kinds
    }
    deciding = page.score.removeprefix(CROSS_FIT)
    script = "\n".join(folder.joinpath(name).read_text("utf-8") for name in SCRIPTS)
    return render_page(
        "sort_page.html.jinja",
        page=page,
        scores=names,
        asks_others=not scales.keys().isdisjoint(ASKING_OTHERS),
        coloured_by=deciding if deciding in ASKING_OTHERS else "excess",
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
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _columns(page: SortPage) -> dict[str, Any]:
    """The rows as columns, which are shorter; `file` and `low` refer to other lists."""
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
        "scores": {name: [_short(row.scores[name]) for row in rows] for name in scores},
        "loss": [_short(row.mean_loss) for row in rows],
        "entropy": [_short(row.mean_entropy) for row in rows],
        "targets": [row.num_targets for row in rows],
        "dropped": {place: printable(row.dropped) for place, row in enumerate(rows) if row.dropped},
        "pairs": [
            {
                "kind": pair.kind,
                "rows": pair.rows,
                "texts": [printable(text) for text in pair.texts],
                "likeness": _short(pair.likeness),
            }
            for pair in page.pairs
        ],
    }


def _score_names(page: SortPage) -> list[str]:
    return list(page.rows[0].scores) if page.rows else [page.score]


def _harmless(content: str) -> Markup:
    """JSON in which nothing ends the script element that holds it."""
    return Markup(content.replace("<", "\\u003c"))


def _short(value: float) -> float | None:
    """To four figures; JSON has no word for what is not a number."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
