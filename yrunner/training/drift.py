"""Drift: KL of the tuned model to its base on replay rows, as a measure of forgetting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from yrunner.data.conversation import TokenizedExample
from yrunner.scoring.base_predictions import CachedPredictions, measure_divergences


@dataclass(frozen=True)
class DriftGauge:
    """KL(base || tuned) on replay rows that are not trained on."""

    examples: Sequence[TokenizedExample]
    tops: CachedPredictions | None
    """Predictions of the base; None: run the model with its adapter off."""
    pad_token_id: int
    max_tokens: int
    """Of a batch, with its padding."""

    def measure(self, model: Any) -> float:
        """The divergence in nats per token, over all rows."""
        divergence_N = torch.cat(
            measure_divergences(
                model,
                self.examples,
                self.tops,
                pad_token_id=self.pad_token_id,
                max_tokens=self.max_tokens,
            )
        )
        # Rounding can make a divergence of zero slightly negative.
        return max(0.0, float(divergence_N.mean()))


def count_stalled(validations: Sequence[tuple[float, float]]) -> int:
    """Validations at the end, in a row, that moved further from the base and gained nothing.

    `validations`: loss and drift of each, in order. Nothing was gained where the loss is not below
    all that were before it.
    """
    stalled = 0
    for place in range(len(validations) - 1, 0, -1):
        loss, drift = validations[place]
        best = min(before for before, _ in validations[:place])
        if drift <= validations[place - 1][1] or loss < best:
            break
        stalled += 1
    return stalled


def drift_points(records: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Loss and drift of every validation among the records that has both."""
    keys = ("eval_loss", "eval_drift")
    return [(row[keys[0]], row[keys[1]]) for row in records if all(key in row for key in keys)]


def drift_warning(validations: Sequence[tuple[float, float]]) -> list[str]:
    """The line for a run that only moves away from its base; none where it still learns."""
    stalled = count_stalled(validations)
    if not stalled:
        return []
    times = "the last validation" if stalled == 1 else f"the last {stalled} validations"
    return [f"forgetting without learning: {times} moved from the base and gained nothing"]
