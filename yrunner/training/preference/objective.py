"""Learning from preferences: DPO, SimPO, ORPO over pairs, KTO over rated answers."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from yrunner.data.batching.batches import Batch
from yrunner.distributed.collectives import sum_over_ranks
from yrunner.losses.preference import kto_baseline
from yrunner.models.limits import evaluating
from yrunner.recipe.schema.preference import KtoLoss
from yrunner.recipe.schema.recipe import PreferenceLoss, Spikes
from yrunner.scoring.base_predictions import to_device
from yrunner.training.metrics import SignalMeter
from yrunner.training.objective import Objective
from yrunner.training.preference.answers import (
    AnswerLogProbs,
    count_chosen_targets,
    count_rows,
    figures_of_answers,
    loss_of_rows,
    measure_answers,
    record_of,
    sum_other_ratios,
)
from yrunner.training.spike_guard import SpikeGuard


class PreferenceObjective(Objective):
    """The mean loss over the pairs, or the rated answers, of an update."""

    def __init__(self, section: PreferenceLoss, spikes: Spikes) -> None:
        figures_of = partial(figures_of_answers, section)
        super().__init__(SpikeGuard(spikes, figures_of), SignalMeter(figures_of))
        self.section = section
        self._counts_2 = torch.ones(2)
        """Rows and chosen targets of the update, over all ranks."""
        self._z0 = torch.zeros((), dtype=torch.float64)
        """KTO's estimate of the KL to the reference, over the whole update."""

    def begin_update(self, model: Any, batches: Sequence[Batch], device: torch.device) -> None:
        """Start the clock, count rows and chosen targets, and estimate KTO's baseline."""
        self.meter.start()
        self._counts_2 = sum_over_ranks(_counts(batches).to(device)).clamp(min=1)
        self._z0 = self._baseline(model, [to_device(batch, device) for batch in batches])

    def _baseline(self, model: Any, batches: Iterable[Batch]) -> Tensor:
        if not isinstance(self.section, KtoLoss):
            return self._z0
        with torch.no_grad(), evaluating(model):
            found = [(sum_other_ratios(model, batch), count_rows(batch)) for batch in batches]
        total = torch.stack([ratios for ratios, _ in found]).sum()
        number = total.new_tensor(sum(rows for _, rows in found))
        total, number = sum_over_ranks(torch.stack([total, number]))
        return kto_baseline(total, number)

    def loss(self, model: Any, called: Any, batch: Batch) -> Tensor:
        """See `Objective`."""
        answers = measure_answers(model, called, batch, self.section)
        loss_R = loss_of_rows(answers, self.section, self._z0)
        record_R = record_of(answers, self.section, loss_R, self._z0)
        self.meter.add(record_R)
        self.guard.add(record_R)
        return self._total(answers, loss_R, self._counts_2).float()

    def _total(self, answers: AnswerLogProbs, loss_R: Tensor, counts_2: Tensor) -> Tensor:
        """The part of some rows in a mean over all; `counts_2`: rows and chosen targets of all."""
        total = loss_R.sum() / counts_2[0]
        if sft := getattr(self.section, "sft", 0.0):
            total = total - sft * answers.log_prob_S[0::2].sum() / counts_2[1]
        return total

    def alone(self, model: Any, batch: Batch) -> tuple[Tensor, float]:
        """The loss of a batch; KTO's baseline is that of the update it was in."""
        answers = measure_answers(model, model, batch, self.section)
        loss_R = loss_of_rows(answers, self.section, self._z0)
        total = self._total(answers, loss_R, _counts([batch]).clamp(min=1).to(loss_R.device))
        return total, float(total)

    def validate(self, model: Any, batches: Iterable[Batch]) -> dict[str, float]:
        """The loss as it is minimised, reward accuracy, margin and log ratios of all rows."""
        model.eval()
        found: list[AnswerLogProbs] = []
        others: list[Tensor] = []
        is_kto = isinstance(self.section, KtoLoss)
        for batch in batches:
            with torch.no_grad():
                found.append(measure_answers(model, model, batch, self.section))
                if is_kto:
                    rows = found[-1].log_prob_S.new_tensor(count_rows(batch))
                    others.append(torch.stack([sum_other_ratios(model, batch), rows]))
        z0 = self._z0
        if is_kto:
            z0 = kto_baseline(*sum_over_ranks(torch.stack(others).sum(dim=0)))
        meter = SignalMeter(self.meter.figures_of)
        for answers in found:
            loss_R = loss_of_rows(answers, self.section, z0)
            meter.add(record_of(answers, self.section, loss_R, z0))
        figures = meter.drain()
        kept = ("loss", "reward_accuracy", "reward_margin", "chosen_log_ratio", "targets")
        return {f"eval_{name}": figures[name] for name in kept if name in figures}


def _counts(batches: Sequence[Batch]) -> Tensor:
    """Rows and targets of the better answers."""
    rows = sum(count_rows(batch) for batch in batches)
    chosen = torch.stack([count_chosen_targets(batch) for batch in batches]).sum()
    return torch.tensor([float(rows), float(chosen)], dtype=torch.float64)
