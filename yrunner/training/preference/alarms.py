"""Warnings of a preference run: better answers are unlearned, or pairs are won too easily."""

from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
"""One line of the metrics."""

LATEST = 5
"""Training records whose mean is judged: one of them is noisy."""
FALLEN = 1.0
"""Nats per answer below the reference from which on the better answers count as unlearned."""
FEWEST_PAIRS = 8
"""With fewer pairs in the first record, winning all of them says little."""


def preference_alarms(records: Sequence[Record]) -> dict[str, str]:
    """A sentence for each alarm that the training records so far give, by its name."""
    judged = [record for record in records if "reward_accuracy" in record]
    found = {"unlearned": _unlearned(judged), "too easy": _too_easy(judged)}
    return {name: sentence for name, sentence in found.items() if sentence}


def _unlearned(records: Sequence[Record]) -> str:
    ratios = [row["chosen_log_ratio"] for row in records if "chosen_log_ratio" in row][-LATEST:]
    if not ratios or (mean := sum(ratios) / len(ratios)) > -FALLEN:
        return ""
    return (
        f"the better answers have become less likely than under the reference ({mean:+.1f} nats "
        "each): set loss.sft (0.1 to 1), a larger loss.beta, or keep"
    )


def _too_easy(records: Sequence[Record]) -> str:
    first = records[0] if records else {}
    if first.get("reward_accuracy", 0) < 1 or first.get("pairs", 0) < FEWEST_PAIRS:
        return ""
    longer = first["longer_wins"]
    cause = "the reference may be wrong"
    if longer in (0.0, 1.0):
        cause = f"the longer answer is the {'better' if longer else 'worse'} one in each of them"
    elif longer > 0.9 or longer < 0.1:
        cause = f"length tells them apart (longer wins: {longer:.0%})"
    return f"all pairs are won from the start: {cause}"
