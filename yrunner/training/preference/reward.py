"""Train a reward model: the better answer of a pair should score higher."""

# Shapes: S = answers of a micro-batch, P = pairs

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from yrunner.data.batching.answers import model_inputs
from yrunner.data.batching.batches import Batch
from yrunner.distributed.collectives import sum_over_ranks
from yrunner.losses.preference import bradley_terry_loss
from yrunner.losses.score_head import measure_scores
from yrunner.recipe.schema.preference import BradleyTerryLoss
from yrunner.recipe.schema.recipe import Spikes
from yrunner.training.metrics import Figures, SignalMeter
from yrunner.training.objective import Objective
from yrunner.training.preference.answers import count_rows
from yrunner.training.spike_guard import SpikeGuard

RECORD = ("pairs", "loss", "correct", "longer_wins", "chosen_score", "rejected_score", "targets")
"""The names of the sums in a record."""


class RewardObjective(Objective):
    """The mean loss over the pairs of an update."""

    def __init__(self, section: BradleyTerryLoss, spikes: Spikes) -> None:
        super().__init__(SpikeGuard(spikes, figures_of_scores), SignalMeter(figures_of_scores))
        self.section = section
        self._num_pairs = torch.ones(())
        """Of the update, over all ranks."""

    def begin_update(self, model: Any, batches: Sequence[Batch], device: torch.device) -> None:
        """Start the clock, and count the pairs."""
        self.meter.start()
        pairs = torch.tensor(float(sum(count_rows(batch) for batch in batches)), device=device)
        self._num_pairs = sum_over_ranks(pairs).clamp(min=1)

    def loss(self, model: Any, called: Any, batch: Batch) -> Tensor:
        """See `Objective`."""
        loss_P, record_R = self._measure(called, batch)
        self.meter.add(record_R)
        self.guard.add(record_R)
        return loss_P.sum() / self._num_pairs

    def alone(self, model: Any, batch: Batch) -> tuple[Tensor, float]:
        """The mean loss of a batch."""
        total = self._measure(model, batch)[0].mean()
        return total, float(total)

    def validate(self, model: Any, batches: Iterable[Batch]) -> dict[str, float]:
        """The loss, and how often and by how much the better answer scores higher."""
        model.eval()
        meter = SignalMeter(figures_of_scores)
        for batch in batches:
            with torch.no_grad():
                meter.add(self._measure(model, batch)[1])
        figures = meter.drain()
        kept = ("loss", "reward_accuracy", "reward_margin", "targets")
        return {f"eval_{name}": figures[name] for name in kept}

    def _measure(self, called: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of each pair, and the record of the micro-batch."""
        score_S = measure_scores(called, model_inputs(batch), batch["last_S"])
        chosen_P, rejected_P = score_S[0::2], score_S[1::2]
        loss_P = bradley_terry_loss(
            chosen_P, rejected_P, margin=self.section.margin, center=self.section.center
        )
        return loss_P, _record(loss_P, chosen_P, rejected_P, batch["num_targets_S"])


def _record(loss_P: Tensor, chosen_P: Tensor, rejected_P: Tensor, num_targets_S: Tensor) -> Tensor:
    """The sums of a micro-batch, in the order of RECORD; detached, float64."""
    is_won_P = (chosen_P > rejected_P).double() + (chosen_P == rejected_P).double() / 2
    is_longer_P = num_targets_S[0::2] > num_targets_S[1::2]
    values = (is_won_P, is_longer_P, chosen_P, rejected_P, num_targets_S)
    parts = [torch.ones_like(loss_P), loss_P, *values]
    return torch.stack([part.detach().double().sum() for part in parts])


def figures_of_scores(sums: Sequence[float]) -> Figures:
    """The figures of summed records, per pair, under their names in metrics.jsonl."""
    pairs, loss, correct, longer, chosen, rejected, targets = sums
    rows = max(pairs, 1)
    return {
        "loss": loss / rows,
        "reward_accuracy": correct / rows,
        "reward_margin": (chosen - rejected) / rows,
        "chosen_score": chosen / rows,
        "rejected_score": rejected / rows,
        "longer_wins": longer / rows,
        "pairs": int(pairs),
        "targets": int(targets),
    }
