"""Groups of answers as a page: rewards side by side, tokens coloured by how they are pushed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yrunner.console import format_cell
from yrunner.reports.html import render_page
from yrunner.reports.token_text import TokenText, visible
from yrunner.storage.run_dir import write_text


@dataclass(frozen=True)
class ShownToken:
    """A token of an answer, or the tokens of one character."""

    text: str
    is_special: bool
    push: float
    """Advantage times ratio: above 0 it is made likelier."""
    ratio: float
    probability: float
    is_clipped: bool

    @property
    def strength(self) -> float:
        """How strong its colour is, 0 to 1: a push of 1 has half of it."""
        return abs(self.push) / (1 + abs(self.push))


@dataclass(frozen=True)
class ShownRollout:
    """An answer, and what became of it."""

    generation: int
    fate: str
    text: str
    reward: float | None
    parts: Mapping[str, float | None]
    """What each reward said, by name."""
    advantage: float
    tokens: Sequence[ShownToken] = ()
    """Empty where the run kept no figures of its tokens."""
    num_hidden: int = 0
    """Tokens behind those."""


@dataclass(frozen=True)
class ShownGroup:
    """The answers to one prompt."""

    title: str
    prompt: str
    answers: Sequence[ShownRollout]


@dataclass(frozen=True)
class RolloutPage:
    """What the page shows."""

    title: str
    loss: str
    groups: Sequence[ShownGroup]


def tokens_of(found: Mapping[str, Any], advantage: float, text: TokenText) -> list[ShownToken]:
    """The tokens of a line of rollout_tokens.jsonl; those of a character count by their mean."""
    shown: list[ShownToken] = []
    clipped, start = set(found["clipped"]), 0
    before: list[int] = []
    for ids in text.characters(found["ids"]):
        places = range(start, start + len(ids))
        ratio = sum(found["ratio"][place] for place in places) / len(ids)
        is_special = ids[0] in text.special_ids
        plain = "" if is_special else text.decode(ids, before)
        shown.append(
            ShownToken(
                visible(plain or text.names(ids)),
                is_special,
                advantage * ratio,
                ratio,
                math.exp(sum(found["log_prob"][place] for place in places)),
                any(place in clipped for place in places),
            )
        )
        start, before = start + len(ids), ids
    return shown


def write_rollout_page(page: RolloutPage, path: Path) -> None:
    """Write the page; the file appears under its name only when it is complete."""
    write_text(path, render_page("rollout_page.html.jinja", page=page, figure=format_cell))
