"""The results of `yrun sort`: the files of rows, reasons and scores, and the page."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from yrunner.commands.sort.clusters import ClusterFacts
from yrunner.commands.sort.corpus import CorpusRow, Decision, MarkedSpan, Seen, Verdict
from yrunner.commands.sort.marks import content_of, file_names
from yrunner.commands.sort.write import RowPlace, write_rows
from yrunner.data.conversation import TokenizedExample
from yrunner.data.dataset.examples import Column, Examples
from yrunner.data.dataset.quality import Finding, RowPair, find_pairs
from yrunner.data.dataset.row_report import Refusal
from yrunner.reports.sort_page import (
    BETTER_THAN,
    PageClusters,
    SideBySide,
    SideKind,
    SortedRow,
    SortPage,
    TokensOfExample,
    pack_tokens,
    write_sort_page,
)
from yrunner.reports.token_text import TokenText, visible
from yrunner.reports.token_view import CLOSED, OPENED
from yrunner.scoring.clusters import Clusters
from yrunner.scoring.order import Mark, suspicion
from yrunner.scoring.rank import OUTLIER, entropy, loss
from yrunner.scoring.sound_share import expect_sound
from yrunner.storage.run_dir import SortDir, write_json, write_text

MOST_MAPPED_TOKENS = 200_000
"""Tokens with a heat map on the page, at about 20 bytes each."""
LONGEST_TEXT = 160
"""Characters of question and answer each, in the searchable list."""
LONGEST_SIDE = 1000
"""Characters of question and answer each, in a pair of rows."""
MOST_PAIRS: Mapping[SideKind, int] = {
    "conflict": 200,
    "contradiction": 200,
    "duplicate": 50,
    "near": 200,
}
CONTRADICTS = 2.0
"""Standard deviations above similar places from which a target contradicts another row."""
WORST_SHARE = 0.1
"""Share of the rows of which the page says how many are sound, where none are dropped."""
BEFORE_TARGET = 24
"""Characters before a target that contradicts another row."""


@dataclass(frozen=True)
class LeftOut:
    """A row that the recipe's rules leave out, so it has no scores."""

    place: RowPlace
    refusal: Refusal


@dataclass(frozen=True)
class Sorted:
    """A scored corpus with everything that is written about it."""

    files: list[Path]
    """The training files; a `RowPlace` has the index of one."""
    rows: list[CorpusRow]
    verdicts: list[Verdict]
    worst: list[MarkedSpan | None]
    """The worst span of each row as text."""
    decision: Decision
    left_out: list[LeftOut]
    deciding: str
    """The name of the deciding score."""
    marks: Mapping[int, Mark]
    """What a person decided, by the index of the row."""
    clusters: Clusters | None = None
    cluster_facts: Sequence[ClusterFacts] = ()

    def name(self, row: RowPlace) -> str:
        """Display name of a row's file."""
        return file_names(self.files)[row[0]]

    def decisive(self, index: int) -> float:
        """The deciding score of a row."""
        return self.verdicts[index].named_scores()[self.deciding]

    def worst_and_sound(self) -> tuple[int, int] | None:
        """The number of rows in the worst tenth, or dropped, and how many are probably sound.

        None if that cannot be estimated: of a cross-fit, of other scores than `outlier`, and of few
        rows.
        """
        if self.deciding != OUTLIER:
            return None
        number = len(self.decision.dropped) or round(WORST_SHARE * len(self.rows))
        sound = expect_sound([self.decisive(index) for index in range(len(self.rows))], number)
        return None if sound is None else (number, sound)


def write_results(corpus: Sorted, folder: SortDir) -> None:
    """Write the rows, reasons and scores; the scores last, as the mark of completeness."""
    decision = corpus.decision
    write_rows(corpus.files, [corpus.rows[index].place for index in decision.order], folder.sorted)
    dropped = [corpus.rows[row.index].place for row in decision.dropped]
    left_out = [row.place for row in corpus.left_out]
    if dropped or left_out:
        write_rows(corpus.files, [*dropped, *left_out], folder.dropped)
        _write_lines(folder.reasons, _reasons(corpus))
    if corpus.clusters is not None:
        write_json(folder.clusters, _clusters(corpus))
    _write_lines(folder.scores, _records(corpus))


def _clusters(corpus: Sorted) -> dict[str, Any]:
    return {
        "deciding": corpus.deciding,
        "clusters": [
            {
                "cluster": fact.number,
                "rows": fact.size,
                "suspicious": fact.num_suspicious,
                "words": fact.words,
                "typical": [_start(corpus, corpus.rows[index].place) for index in fact.typical],
            }
            for fact in corpus.cluster_facts
        ],
    }


def _reasons(corpus: Sorted) -> Iterable[dict[str, Any]]:
    """One line per dropped row."""
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
    """One line per row that was read, in file order."""
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
    if corpus.clusters is not None:
        record["cluster"] = corpus.clusters.numbers[index]
        record["plane"] = [_short(value) for value in corpus.clusters.plane[index]]
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
    return f"cannot be used: {left_out.refusal.reason}"


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    return {kind: _short(value) for kind, value in scores.items()}


def _short(value: float) -> float:
    """Six significant digits: more are rounding noise of float32."""
    return float(f"{value:.6g}")


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    write_text(path, "".join(f"{line}\n" for line in lines))


def write_sort_report(
    title: str,
    tokenizer: Any,
    examples: Examples,
    groups: Sequence[range],
    seen: Seen,
    deciding: str,
    row_scores: Sequence[Mapping[str, float]],
    dropped: Mapping[int, str],
    findings: Sequence[Finding],
    path: Path,
    *,
    marks: Mapping[int, Mark] = MappingProxyType({}),
    worst_and_sound: tuple[int, int] | None = None,
    clusters: PageClusters | None = None,
) -> None:
    """Write the page. Each of the `groups` is listed as one row: an example, or the answers of a
    pair. `row_scores`, `marks` and the reasons in `dropped` are by group.

    `deciding` names one of the scores. `worst_and_sound`: a number of most suspicious rows, and how
    many of them are probably sound.
    """
    suspicions = [suspicion(deciding, of_row[deciding]) for of_row in row_scores]
    paths = [stored.file for stored in examples.files]
    names = dict(zip(paths, file_names(paths), strict=True))
    text = _RowText(tokenizer, examples)
    lengths_G = np.array([sum(examples.lengths[place] for place in group) for group in groups])
    mapped = _choose_mapped(suspicions, lengths_G)
    token_text = TokenText(tokenizer)
    contents_E = examples.column("contents")
    rows = []
    for index, group in enumerate(groups):
        origin = examples.origin(group[0])
        scored = [seen.best[place] for place in group]
        loss_N = torch.cat([one.loss_N for one in scored])
        entropy_N = torch.cat([one.entropy_N for one in scored])
        rows.append(
            SortedRow(
                file=names[origin.file],
                number=origin.row,
                text=text.of(group, LONGEST_TEXT),
                scores=row_scores[index],
                mean_loss=loss(loss_N, entropy_N),
                mean_entropy=entropy(loss_N, entropy_N),
                num_targets=len(loss_N),
                dropped=dropped.get(index),
                heat_map=_heat_map(group, examples, seen, token_text) if index in mapped else None,
                content=content_of(contents_E, group),
                mark=marks.get(index),
            )
        )
    # Pairs are two answers to one question by their nature.
    found = find_pairs(examples) if seen.against is None else []
    pairs: list[SideBySide] = [
        _side_by_side(pair, text) for pair in _worst_first(found, suspicions)
    ]
    pairs += _contradicting_pairs(examples, seen, text, token_text, found)
    page = SortPage(
        title=title,
        score=deciding,
        rows=rows,
        pairs=[
            pair
            for kind, most in MOST_PAIRS.items()
            for pair in islice((pair for pair in pairs if pair.kind == kind), most)
        ],
        num_pairs={kind: sum(pair.kind == kind for pair in pairs) for kind in MOST_PAIRS},
        findings=[(finding.what, finding.count, _places(finding)) for finding in findings],
        worst_and_sound=worst_and_sound,
        clusters=clusters,
    )
    write_sort_page(page, path)


def _heat_map(group: range, examples: Examples, seen: Seen, text: TokenText) -> str:
    """The tokens of an example, or those of a better answer and then those of the worse one."""

    def of(figures: Sequence[Any] | None, place: int) -> Any:
        return None if figures is None else figures[place]

    return pack_tokens(
        [
            TokensOfExample(
                examples[place],
                seen.best[place],
                of(seen.lookups, place),
                of(seen.best_deviations, place),
                of(seen.best_against, place),
            )
            for place in group
        ],
        text,
    )


class _RowText:
    """Rows as plain text, without the first and last lines that all questions share."""

    def __init__(self, tokenizer: Any, examples: Examples) -> None:
        self.tokenizer = tokenizer
        self.examples = examples
        questions = [
            self._decode(example.input_ids[: _first_target(example)]) for example in examples
        ]
        start = _common_lines(questions)
        backwards = [question.removeprefix(start)[::-1] for question in questions]
        end = _common_lines(backwards)
        self.questions = [question.removeprefix(end)[::-1].strip() for question in backwards]

    def of(self, group: Sequence[int], longest: int) -> str:
        """The text before the first target, and the rest of each example."""
        question = self.questions[group[0]]
        answers = []
        for example in (self.examples[index] for index in group):
            answer = self._decode(example.input_ids[_first_target(example) :]).strip()
            answers.append(f"{answer[:longest]}…" if len(answer) > longest else answer)
        if len(question) > longest:
            question = f"…{question[-longest:]}"
        answer = f" {BETTER_THAN} ".join(answers)
        return visible(f"{question} → {answer}" if question else answer)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _common_lines(texts: Sequence[str]) -> str:
    """The whole lines that all texts begin with."""
    if len(texts) < 2:
        return ""
    # In sorted order, what the first and the last text begin with, all begin with.
    first, last = (text.split("\n")[:-1] for text in (min(texts), max(texts)))
    both = takewhile(lambda lines: lines[0] == lines[1], zip(first, last, strict=False))
    return "".join(f"{line}\n" for line, _ in both)


def _first_target(example: TokenizedExample) -> int:
    return next(iter(example.target_positions), len(example.input_ids))


def _choose_mapped(suspicions: Sequence[float], lengths_E: Column) -> set[int]:
    """The rows with a heat map: all if they fit; else the most suspicious for half of the
    tokens, and evenly spaced others for the rest."""
    falling = np.argsort(-np.array(suspicions), kind="stable")
    tokens_E = lengths_E[falling].cumsum()
    if not len(falling) or tokens_E[-1] <= MOST_MAPPED_TOKENS:
        return set(falling.tolist())
    half = MOST_MAPPED_TOKENS // 2
    first = int(np.searchsorted(tokens_E, half))
    step = -(-int(tokens_E[-1] - half) // half)
    return {*falling[:first].tolist(), *falling[first::step].tolist()}


def _worst_first(pairs: Sequence[RowPair], suspicions: Sequence[float]) -> list[RowPair]:
    """The conflicts with the most suspicious rows first; the others stay in their order."""
    worst = {
        pair: max(suspicions[pair.first], suspicions[pair.second])
        for pair in pairs
        if pair.kind == "conflict"
    }
    return sorted(pairs, key=lambda pair: -worst.get(pair, 0.0))


def _side_by_side(pair: RowPair, text: _RowText) -> SideBySide:
    first, second = (text.of([row], LONGEST_SIDE) for row in (pair.first, pair.second))
    return SideBySide(pair.kind, (pair.first, pair.second), (first, second), pair.likeness)


def _contradicting_pairs(
    examples: Examples,
    seen: Seen,
    text: _RowText,
    token_text: TokenText,
    others: Sequence[RowPair],
) -> Iterator[SideBySide]:
    """Rows that contradict each other: those that answer nearly alike, then those with a target for
    which a row on the same question has another token. Pairs that are shown for another reason are
    left out."""
    told = {frozenset((pair.first, pair.second)) for pair in others}
    for index, other, place, said, instead in _contradictions(examples, seen):
        rows = (index, other)
        if frozenset(rows) in told:
            continue
        told.add(frozenset(rows))
        example = examples[index]
        before = example.input_ids[:place]
        answered = before[_first_target(example) :]
        after = token_text.decode(answered)[-BEFORE_TARGET:]
        here, there = (token_text.decode(list(ids), before) for ids in (said, instead))
        yield SideBySide(
            "contradiction",
            rows,
            (text.of(rows[:1], LONGEST_SIDE), text.of(rows[1:], LONGEST_SIDE)),
            1.0,
            visible(f"…{after}{OPENED}{here}{CLOSED} / {OPENED}{there}{CLOSED}"),
        )


def _contradictions(
    examples: Examples, seen: Seen
) -> Iterator[tuple[int, int, int, Sequence[int], Sequence[int]]]:
    """Index of a row, that of the one it contradicts, the position of the first difference, and
    the tokens that both have there; the strongest contradiction first, then the most unexpected."""
    strongest = sorted(seen.contradictions.items(), key=lambda each: -each[1].strength)
    for index, found in strongest:
        place = list(examples[index].target_positions)[found.targets[0]]
        yield index, found.against, place, found.said, found.instead
    if seen.lookups is None or seen.deviations is None:
        return
    worst: list[tuple[float, int, int]] = []
    for index, (lookup, deviation_N) in enumerate(zip(seen.lookups, seen.deviations, strict=True)):
        contradicted_N = torch.where(lookup.against_N >= 0, deviation_N, -torch.inf)
        if len(contradicted_N) and contradicted_N.max() >= CONTRADICTS:
            worst.append((-float(contradicted_N.max()), index, int(contradicted_N.argmax())))
    for _, index, target in sorted(worst):
        lookup = seen.lookups[index]
        place = list(examples[index].target_positions)[target]
        suggested = [int(lookup.suggested_N[target])]
        said = [examples[index].input_ids[place]]
        yield index, int(lookup.against_N[target]), place, said, suggested


def _places(finding: Finding) -> str:
    places = ", ".join(f"{place.file.name}:{place.row}" for place in finding.places)
    return f"{places}, …" if finding.count > len(finding.places) else places
