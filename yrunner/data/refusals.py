"""Rows that are not learned from: why, and the sentence that stops a run because of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yrunner.data.conversation import FaultKind
from yrunner.errors import Origin

SHOWN_REFUSALS = 10

KIND_WORDS: dict[FaultKind, str] = {
    "unreadable": "cannot be read",
    "not_an_object": "not an object",
    "missing_field": "missing field",
    "wrong_type": "wrong type",
    "empty": "empty",
    "roles": "roles out of order",
    "characters": "broken characters",
    "template": "the chat template cannot render it",
    "no_targets": "nothing to learn",
    "too_long": "too long",
}


@dataclass(frozen=True)
class Refusal:
    """A row that is not learned from."""

    origin: Origin
    kind: FaultKind
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"

    @property
    def key(self) -> str:
        """The key of the recipe's `data` that decides what a row of this kind does to the run."""
        return "too_long" if self.kind == "too_long" else "invalid"


def num_rows(number: int) -> str:
    """`1 row`, `2,000 rows`."""
    return "1 row" if number == 1 else f"{number:,} rows"


def describe_refusals(refusals: Sequence[Refusal], summary: str) -> str:
    """The first row of each reason with the number of rows that share it, and the summary.

    It stands last, because the remedy follows it.
    """
    alike: dict[tuple[Path, str], list[Refusal]] = {}
    for refusal in refusals:
        alike.setdefault((refusal.origin.file, refusal.reason), []).append(refusal)
    groups = list(alike.values())
    lines = []
    for first, *others in groups[:SHOWN_REFUSALS]:
        lines.append(f"{first}{f' (and {num_rows(len(others))} more like it)' if others else ''}")
    num_hidden = sum(len(group) for group in groups[SHOWN_REFUSALS:])
    if num_hidden:
        lines.append(f"... and {num_rows(num_hidden)} more")
    return "\n".join([*lines, f"{summary} ({_counts(refusals)})"])


def _counts(refusals: Sequence[Refusal]) -> str:
    counts = Counter(refusal.kind for refusal in refusals)
    return ", ".join(f"{KIND_WORDS[kind]}: {number:,}" for kind, number in counts.most_common())


def refusal_remedy(refusals: Sequence[Refusal]) -> str:
    """What a person can do about these rows."""
    keys = {refusal.key for refusal in refusals}
    remedies = []
    if "invalid" in keys:
        remedies.append("mend the rows, or leave them out with data.invalid: drop")
    if "too_long" in keys:
        remedies.append(
            "raise data.max_length, or leave long rows out with data.too_long: drop, "
            "or cut their ends off with data.too_long: cut"
        )
    return "; ".join(remedies)
