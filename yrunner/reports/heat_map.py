"""Examples as a page: every target coloured by its loss, entropy or weight, before and after."""

# N = targets of one example or of several

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yrunner.data.conversation import TokenizedExample
from yrunner.losses.nlirg import EASY_UP_TO, HARD_UP_TO, LEARNING_UP_TO, ZONES, zone_edges, zone_of
from yrunner.reports.html import four_digits, render_page
from yrunner.reports.token_text import TokenText, pieces_of, top_texts
from yrunner.scoring.measure import TokenScores
from yrunner.storage.run_dir import write_text
from yrunner.tokens import IGNORE_INDEX

BEFORE, AFTER = "before", "after"
"""The two models: before training and after."""

SCALES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "loss": ((0.05, 0.3, EASY_UP_TO, 3.0, LEARNING_UP_TO, HARD_UP_TO), (0.1, 1.0, 3.0)),
    "entropy": ((0.05, 0.3, 1.0, 2.0, 3.5, 5.0), (0.1, 0.5, 2.0)),
    "weight": ((0.05, 0.2, 0.4, 0.6, 0.8, 0.95), (0.05, 0.2, 0.5)),
}
"""Borders between the colours: of a figure, and of its change in either direction. Those of the
loss include the borders of the zones, so that no colour covers two zones."""

_Step = tuple[str, int, str]
"""A colour of a legend: its attribute, its number, and its range."""


@dataclass(frozen=True)
class ScoredExample:
    """An example with the scores of its targets by each model."""

    example: TokenizedExample
    scores: Mapping[str, TokenScores]
    """By `BEFORE` and `AFTER`, as in `HeatMap.models`."""
    left_out: str = ""
    """Why it is not trained on; empty if it is."""
    mark: str = ""
    """Which answer of a pair it is, or how it is rated. Then the change of a token's loss is the
    negative of its log-probability's ratio to the base."""


@dataclass(frozen=True)
class HeatMap:
    """What the page shows."""

    title: str
    models: Mapping[str, str]
    """Description of each model, by `BEFORE` and `AFTER`; one or both."""
    weighting: str
    """Name of the weighting."""
    loss_deadline: float
    """The loss at which the refused zone begins."""
    examples: Sequence[ScoredExample]
    other_settings: Sequence[str] = ()
    """Keys of the recipe that have changed since the result was trained."""


@dataclass(frozen=True)
class Summary:
    """Means over some targets."""

    num_targets: int
    loss: float
    entropy: float
    weight: float
    top: float
    """Share of the targets that are the model's top prediction."""
    zones: list[float]
    """Share of the targets in each zone, in the order of `ZONES`."""


def write_heat_map(heat_map: HeatMap, tokenizer: Any, path: Path) -> None:
    """Write the page; the file appears under its name only when it is complete."""
    write_text(path, render_heat_map(heat_map, tokenizer))


def render_heat_map(heat_map: HeatMap, tokenizer: Any) -> str:
    """The whole page as text; `tokenizer` is that of the examples."""
    text = TokenText(tokenizer)
    deadline = heat_map.loss_deadline
    borders = [0.0, *zone_edges(deadline)]
    shown = [_shown(part, text, deadline) for part in heat_map.examples]
    return render_page(
        "heat_map.html.jinja",
        scripts=["heat_map.js"],
        map=heat_map,
        legends={figure: _legend(*borders) for figure, borders in SCALES.items()},
        zones=list(zip(ZONES, borders, [*borders[1:], math.inf], strict=True)),
        examples=shown,
        total={
            when: summarize(
                [(part.example, part.scores[when]) for part in heat_map.examples], deadline
            )
            for when in heat_map.models
        },
        figures={
            "scales": SCALES,
            "zones": ZONES,
            "examples": [example["figures"] for example in shown],
        },
    )


def summarize(
    scored: Sequence[tuple[TokenizedExample, TokenScores]], loss_deadline: float
) -> Summary:
    """The means of one model over all targets of these examples."""
    loss_N, entropy_N, weight_N = (
        torch.cat([getattr(scores, name) for _, scores in scored]).double()
        for name in ("loss_N", "entropy_N", "weight_N")
    )
    is_top_N = torch.cat([scores.top_N == _targets(example) for example, scores in scored])
    zone_N = zone_of(loss_N, loss_deadline)
    return Summary(
        num_targets=len(loss_N),
        loss=float(loss_N.mean()),
        entropy=float(entropy_N.mean()),
        weight=float(weight_N.mean()),
        top=float(is_top_N.double().mean()),
        zones=[float((zone_N == zone).double().mean()) for zone in range(len(ZONES))],
    )


def _shown(part: ScoredExample, text: TokenText, loss_deadline: float) -> dict[str, Any]:
    """An example for the template."""
    return {
        "origin": part.example.origin,
        "num_tokens": len(part.example.input_ids),
        "left_out": part.left_out,
        "mark": part.mark,
        "pieces": pieces_of(part.example, text),
        "summaries": {
            when: summarize([(part.example, scores)], loss_deadline)
            for when, scores in part.scores.items()
        },
        "figures": {
            when: _figures(part.example, scores, text, loss_deadline)
            for when, scores in part.scores.items()
        },
    }


def _legend(borders: Sequence[float], changes: Sequence[float]) -> dict[str, list[_Step]]:
    """The colours of a figure and of its change, from the lowest."""
    edges = [*(-change for change in reversed(changes)), *changes]
    return {
        "value": [("heat", *step) for step in enumerate(_ranges(borders, "{:g}"))],
        "change": [
            ("shift", *step) for step in enumerate(_ranges(edges, "{:+g}"), start=-len(changes))
        ],
    }


def _ranges(borders: Sequence[float], form: str) -> list[str]:
    """The ranges below, between and above the borders, in symbols rather than words."""
    numbers = [form.format(border).replace("-", "−") for border in borders]
    between = [f"{start} … {end}" for start, end in pairwise(numbers)]
    return [f"< {numbers[0]}", *between, f"≥ {numbers[-1]}"]


def _figures(
    example: TokenizedExample, scores: TokenScores, text: TokenText, loss_deadline: float
) -> dict[str, list[Any]]:
    """The figures of each target for the script."""
    return {
        "loss": _four_digits(scores.loss_N),
        "entropy": _four_digits(scores.entropy_N),
        "weight": _four_digits(scores.weight_N),
        "zone": zone_of(scores.loss_N, loss_deadline).tolist(),
        "agrees": (scores.top_N == _targets(example)).long().tolist(),
        "top": top_texts(example, scores.top_N.tolist(), text),
    }


def _targets(example: TokenizedExample) -> Tensor:
    return torch.tensor([label for label in example.labels if label != IGNORE_INDEX])


def _four_digits(values_N: Tensor) -> list[float | None]:
    return [four_digits(value) for value in values_N.tolist()]
