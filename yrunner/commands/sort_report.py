"""The page of `yrun sort`: rows, scores and pairs as people read them."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from yrunner.commands.sort_corpus import Seen
from yrunner.data.conversation import TokenizedExample
from yrunner.data.findings import Finding
from yrunner.data.pairs import Pair, PairKind, find_pairs
from yrunner.data.store import Examples
from yrunner.reports.sort_page import (
    SideBySide,
    SortedRow,
    SortPage,
    write_sort_page,
)
from yrunner.reports.sort_tokens import pack_tokens
from yrunner.reports.token_text import TokenText, visible
from yrunner.scoring.rank import entropy, loss, suspicion

MOST_MAPPED_TOKENS = 200_000
"""Tokens whose heat map is on the page: they take some seconds to name, and about 20 bytes each."""
LONGEST_TEXT = 160
"""Characters of the question, and of the answer, that are seen in the list and searched."""
LONGEST_SIDE = 1000
"""Characters of the question, and of the answer, of a row beside another."""
MOST_PAIRS: Mapping[PairKind, int] = {"conflict": 200, "duplicate": 50, "near": 200}


def write_sort_report(
    title: str,
    tokenizer: Any,
    examples: Examples,
    seen: Seen,
    deciding: str,
    row_scores: Sequence[Mapping[str, float]],
    dropped: Mapping[int, str],
    findings: Sequence[Finding],
    path: Path,
) -> None:
    """Write the page. Everything goes by the index of an example, also `dropped`, the reasons.

    `row_scores` are by the names of the scores, of which `deciding` is one.
    """
    suspicions = [suspicion(deciding, of_row[deciding]) for of_row in row_scores]
    names = _file_names(examples)
    text = _RowText(tokenizer, examples)
    mapped = _choose_mapped(suspicions, examples)
    token_text = TokenText(tokenizer)
    rows = [
        SortedRow(
            file=names[example.origin.file],
            number=example.origin.row,
            text=text.of(index, LONGEST_TEXT),
            scores=row_scores[index],
            mean_loss=loss(scored.loss_N, scored.entropy_N),
            mean_entropy=entropy(scored.loss_N, scored.entropy_N),
            num_targets=len(scored.loss_N),
            dropped=dropped.get(index),
            heat_map=pack_tokens(
                example, scored, token_text, None if seen.lookups is None else seen.lookups[index]
            )
            if index in mapped
            else None,
        )
        for index, (example, scored) in enumerate(zip(examples, seen.best, strict=True))
    ]
    pairs = find_pairs(examples)
    page = SortPage(
        title=title,
        score=deciding,
        rows=rows,
        pairs=[_side_by_side(pair, text) for pair in _shown_pairs(pairs, suspicions)],
        num_pairs={kind: sum(pair.kind == kind for pair in pairs) for kind in MOST_PAIRS},
        findings=[(finding.what, finding.count, _places(finding)) for finding in findings],
    )
    write_sort_page(page, path)


def _file_names(examples: Examples) -> dict[Path, str]:
    """What a person calls each file: its name, or its path where two have that name."""
    paths = {stored.file for stored in examples.files}
    names = [path.name for path in paths]
    return {path: path.name if names.count(path.name) == 1 else str(path) for path in paths}


class _RowText:
    """Rows as plain text, without the lines that all of them begin and end their question with."""

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

    def of(self, index: int, longest: int) -> str:
        """The question, or what stands before the first target, and the answers."""
        example = self.examples[index]
        question = self.questions[index]
        answer = self._decode(example.input_ids[_first_target(example) :]).strip()
        if len(question) > longest:
            question = f"…{question[-longest:]}"
        if len(answer) > longest:
            answer = f"{answer[:longest]}…"
        return visible(f"{question} → {answer}" if question else answer)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _common_lines(texts: Sequence[str]) -> str:
    """The whole lines that all of several texts begin with."""
    if len(texts) < 2:
        return ""
    # Between the first and the last of the alphabet, all begin with what these two begin with.
    first, last = (text.split("\n")[:-1] for text in (min(texts), max(texts)))
    both = takewhile(lambda lines: lines[0] == lines[1], zip(first, last, strict=False))
    return "".join(f"{line}\n" for line, _ in both)


def _first_target(example: TokenizedExample) -> int:
    return next(iter(example.target_positions), len(example.input_ids))


def _choose_mapped(suspicions: Sequence[float], examples: Examples) -> set[int]:
    """The rows with a heat map: all where there is room; else the most suspicious for half of the
    tokens, and rows spread evenly over the others for the rest."""
    falling = np.argsort(-np.array(suspicions), kind="stable")
    tokens_E = examples.lengths[falling].cumsum()
    if not len(falling) or tokens_E[-1] <= MOST_MAPPED_TOKENS:
        return set(falling.tolist())
    half = MOST_MAPPED_TOKENS // 2
    first = int(np.searchsorted(tokens_E, half))
    step = -(-int(tokens_E[-1] - half) // half)
    return {*falling[:first].tolist(), *falling[first::step].tolist()}


def _shown_pairs(pairs: Sequence[Pair], suspicions: Sequence[float]) -> Iterator[Pair]:
    """Some of each kind: the conflicts with the most suspicious rows, the likest of the others."""
    worst = {
        pair: max(suspicions[pair.first], suspicions[pair.second])
        for pair in pairs
        if pair.kind == "conflict"
    }
    falling = sorted(pairs, key=lambda pair: -worst.get(pair, 0.0))
    for kind, most in MOST_PAIRS.items():
        yield from islice((pair for pair in falling if pair.kind == kind), most)


def _side_by_side(pair: Pair, text: _RowText) -> SideBySide:
    first, second = (text.of(row, LONGEST_SIDE) for row in (pair.first, pair.second))
    return SideBySide(pair.kind, (pair.first, pair.second), (first, second), pair.likeness)


def _places(finding: Finding) -> str:
    places = ", ".join(f"{place.file.name}:{place.row}" for place in finding.places)
    return f"{places}, …" if finding.count > len(finding.places) else places
