"""The files that `yrun sort` writes: the rows in their new order, those dropped, and why."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yrunner.commands.sort_corpus import CorpusRow, Decision, Verdict
from yrunner.commands.sort_rows import RowPlace, write_rows
from yrunner.commands.sort_worst import MarkedSpan
from yrunner.data.refusals import Refusal
from yrunner.run_dir import write_text
from yrunner.sort_dir import SortDir


@dataclass(frozen=True)
class LeftOut:
    """A row that the rules of the recipe's data leave out, so that no model has judged it."""

    place: RowPlace
    refusal: Refusal


@dataclass(frozen=True)
class Sorted:
    """A corpus that is judged: everything that is written down of it."""

    files: list[Path]
    """The training files, as `RowPlace` counts them."""
    rows: list[CorpusRow]
    verdicts: list[Verdict]
    worst: list[MarkedSpan | None]
    """The worst span of each row as text."""
    decision: Decision
    left_out: list[LeftOut]
    deciding: str
    """The name of the score that decides."""

    def name(self, row: RowPlace) -> str:
        """What a person calls the file of a row: its name, or its path where two have that name."""
        path = self.files[row[0]]
        twins = {file for file in self.files if file.name == path.name}
        return path.name if len(twins) == 1 else str(path)

    def decisive(self, index: int) -> float:
        """The score of a row that decides."""
        return self.verdicts[index].named_scores()[self.deciding]


def write_results(corpus: Sorted, folder: SortDir) -> None:
    """Write the rows and what is known of them; the table of scores last: then all is there."""
    decision = corpus.decision
    write_rows(corpus.files, [corpus.rows[index].place for index in decision.order], folder.sorted)
    dropped = [corpus.rows[row.index].place for row in decision.dropped]
    left_out = [row.place for row in corpus.left_out]
    if dropped or left_out:
        write_rows(corpus.files, [*dropped, *left_out], folder.dropped)
        _write_lines(folder.reasons, _reasons(corpus))
    _write_lines(folder.scores, _records(corpus))


def _reasons(corpus: Sorted) -> Iterable[dict[str, Any]]:
    """A line for each line of the dropped rows."""
    for row in corpus.decision.dropped:
        score = _short(corpus.decisive(row.index))
        yield _start(corpus, corpus.rows[row.index].place) | {
            "reason": row.reason,
            "score": score,
        }
    for left_out in corpus.left_out:
        yield _start(corpus, left_out.place) | {
            "reason": _why(left_out),
            "score": None,
        }


def _records(corpus: Sorted) -> Iterable[dict[str, Any]]:
    """A line for each row that was read, in the order of the files."""
    places = {index: place for place, index in enumerate(corpus.decision.order, start=1)}
    reasons = {row.index: row.reason for row in corpus.decision.dropped}
    records = {
        row.place: _record(corpus, index, places.get(index), reasons.get(index))
        for index, row in enumerate(corpus.rows)
    }
    records |= {
        row.place: _start(corpus, row.place)
        | {"place": None, "dropped": _why(row), "num_targets": 0, "scores": None, "worst": None}
        for row in corpus.left_out
    }
    for place in sorted(records):
        yield records[place]


def _record(corpus: Sorted, index: int, place: int | None, reason: str | None) -> dict[str, Any]:
    verdict = corpus.verdicts[index]
    record = _start(corpus, corpus.rows[index].place) | {
        "place": place,
        "dropped": reason,
        "num_targets": verdict.num_targets,
        "scores": _rounded(verdict.scores),
    }
    if verdict.cross_fit is not None:
        record["cross_fit"] = _rounded(verdict.cross_fit)
    worst, text = verdict.worst, corpus.worst[index]
    if worst is None or text is None:
        return record | {"worst": None}
    return record | {
        "worst": {
            "pattern": worst.pattern,
            "text": text.marked,
            "strength": _short(worst.strength),
            "first_target": worst.start,
            "num_targets": worst.end - worst.start,
        }
    }


def _start(corpus: Sorted, place: RowPlace) -> dict[str, Any]:
    return {"file": corpus.name(place), "row": place[1]}


def _why(left_out: LeftOut) -> str:
    return f"cannot be learned from: {left_out.refusal.reason}"


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    return {kind: _short(value) for kind, value in scores.items()}


def _short(value: float) -> float:
    """To six figures: more are rounding of float32."""
    return float(f"{value:.6g}")


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    write_text(path, "".join(f"{line}\n" for line in lines))
