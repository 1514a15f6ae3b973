"""What a person is told of a sorted corpus: its scores, its worst rows, and what comes next."""

import json
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from yrunner.commands.sort_results import Sorted
from yrunner.console import Cell, print_table, say
from yrunner.data.reading import Reading
from yrunner.data.refusals import num_rows
from yrunner.reports.terminal_plot import block_bar
from yrunner.scoring.rank import suspicion
from yrunner.sort_dir import SortDir

SHOWN_ROWS = 10
BINS = 12
WIDEST_BAR = 40
PERCENTILES = {"lowest": 0, "10 %": 10, "median": 50, "90 %": 90, "highest": 100}


def say_sorted(corpus: Sorted, folder: SortDir) -> None:
    """Print the scores, the most suspicious rows, what became of all, and where it is written."""
    decisive = [corpus.decisive(index) for index in range(len(corpus.rows))]
    _print_percentiles(corpus)
    _print_distribution(corpus.deciding, decisive)
    _print_suspicious(corpus, decisive)
    _say_counts(corpus)
    for what, path in (
        ("sorted", folder.sorted),
        ("dropped", folder.dropped),
        ("reasons", folder.reasons),
        ("scores", folder.scores),
        ("report", folder.report),
    ):
        if path.exists():
            say(f"{f'{what}:':<9}{path}")


def say_next(arguments: str, folder: SortDir, format_name: str, reading: Reading) -> None:
    """Print the command that learns from the rows in their new order.

    `arguments`: recipe and overrides of the sort; the format and the reading are those of its data.
    """
    entry: dict[str, Any] = {"file": str(folder.sorted), "format": format_name}
    if reading.columns:
        entry["columns"] = dict(reading.columns)
    changes = (
        "train.order=as_written",
        f"data.train={json.dumps([entry], ensure_ascii=False)}",
    )
    say("")
    say(f"yrun train {arguments} {shlex.join(changes)}    # learn in this order")


def _print_percentiles(corpus: Sorted) -> None:
    columns: dict[str, list[float]] = {}
    for verdict in corpus.verdicts:
        for name, value in verdict.named_scores().items():
            columns.setdefault(name, []).append(value)
    rows: list[tuple[Cell, ...]] = [
        (name, *np.percentile(values, [*PERCENTILES.values()]).tolist())
        for name, values in columns.items()
    ]
    print_table(f"Scores of {num_rows(len(corpus.rows))}", ("score", *PERCENTILES), rows)


def _print_distribution(name: str, scores: Sequence[float]) -> None:
    """A histogram of the score that decides."""
    counts, borders = np.histogram(scores, BINS if max(scores) > min(scores) else 1)
    most = int(counts.max())
    rows = [
        (f"{start:.4g} to {end:.4g}", int(count), block_bar(int(count), most, WIDEST_BAR))
        for count, start, end in zip(counts, borders[:-1], borders[1:], strict=True)
    ]
    print_table(f"Distribution of {name}", (name, "rows", ""), rows)


def _print_suspicious(corpus: Sorted, scores: Sequence[float]) -> None:
    worst = sorted(range(len(scores)), key=lambda index: -suspicion(corpus.deciding, scores[index]))
    rows = []
    for index in worst[:SHOWN_ROWS]:
        place, text = corpus.rows[index].place, corpus.worst[index]
        rows.append(
            (
                f"{corpus.name(place)}:{place[1]}",
                scores[index],
                "–" if text is None else text.line(),
            )
        )
    title = f"Most suspicious by {corpus.deciding}, the worst span in brackets"
    print_table(title, ("row", corpus.deciding, "worst span"), rows)


def _say_counts(corpus: Sorted) -> None:
    decision = corpus.decision
    say(
        f"{num_rows(len(corpus.rows))} scored: {len(decision.order):,} sorted, "
        f"{len(decision.dropped):,} dropped"
    )
    if corpus.left_out:
        say(
            f"{num_rows(len(corpus.left_out))} cannot be learned from "
            "and stand among the dropped ones"
        )
