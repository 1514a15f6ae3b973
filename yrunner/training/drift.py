"""Drift: KL of the tuned model to its base on replay rows, as a measure of forgetting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from yrunner.data.batching.collate import collate
from yrunner.data.conversation import TokenizedExample
from yrunner.losses.fused_head import attach
from yrunner.losses.kl import measure_divergence
from yrunner.scoring.base_predictions import CachedPredictions, predictions_of_base, to_device
from yrunner.scoring.measure import batches_by_length


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
        attach(model)
        total = torch.zeros((), dtype=torch.float64)
        num_targets = 0
        was_training = model.training
        model.eval()
        lengths = [len(example.input_ids) for example in self.examples]
        for indices in batches_by_length(lengths, self.max_tokens):
            batch = collate([self.examples[index] for index in indices], self.pad_token_id)
            batch = to_device(batch, model.device)
            with torch.no_grad():
                base = predictions_of_base(model, batch, indices, self.tops)
                divergence_N = measure_divergence(model, batch, base).divergence_N
            total += divergence_N.double().sum().cpu()
            num_targets += len(divergence_N)
        model.train(was_training)
        # Rounding can make a divergence of zero slightly negative.
        return max(0.0, float(total)) / num_targets


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
