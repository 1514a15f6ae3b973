"""What a run minimises: weighted target losses, plus a regulariser; and the sums to log."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from yrunner.data.batching.batches import Batch
from yrunner.distributed.collectives import sum_over_ranks
from yrunner.losses.fused_head import measure_targets
from yrunner.losses.targets import Targets, TokenWeight, sum_targets
from yrunner.training.drift import DriftGauge
from yrunner.training.histograms import TargetHistograms
from yrunner.training.metrics import SignalMeter
from yrunner.training.replay_loss import Regulariser
from yrunner.training.spike_guard import SpikeGuard


class Objective:
    """The weighted loss of targets, whose gradient is weighed by their loss and entropy."""

    def __init__(
        self,
        weight: TokenWeight,
        *,
        loss_deadline: float,
        normalize: Literal["targets", "weights"],
        guard: SpikeGuard,
        histograms: TargetHistograms | None = None,
    ) -> None:
        self.weight = weight
        self.loss_deadline = loss_deadline
        self.by_weights = normalize == "weights"
        """Whether an update is divided by the sum of its weights, and not by its targets."""
        self.guard = guard
        self.meter = SignalMeter()
        self.histograms = histograms
        self.regulariser: Regulariser | None = None
        """Holds the model to its base; None without `keep`."""
        self.gauge: DriftGauge | None = None
        self._weights_of_update: list[Tensor] = []

    @property
    def sums(self) -> dict[str, Stateful]:
        """What adds up from update to update; see rng_snapshot.py for their attributes."""
        keep = self.regulariser and self.regulariser.mean
        sums = {"meter": self.meter, "guard": self.guard, "histograms": self.histograms}
        every = {**sums, "keep": keep}.items()
        return {name: each for name, each in every if isinstance(each, Stateful)}

    def measure(self, model: Any, batch: Batch) -> Targets:
        """Run a micro-batch forward, and add up the figures of its targets."""
        targets = measure_targets(model, batch, self.weight)
        if self.histograms is not None:
            self.histograms.add(targets)
        record_R = sum_targets(targets, self.loss_deadline)
        self.meter.add(record_R)
        self.guard.add(record_R)
        self._weights_of_update.append(targets.weight_N.sum())
        return targets

    def begin_update(self) -> None:
        """Start the clock, and clear the weights of the previous update."""
        self.meter.start()
        self._weights_of_update = []

    def weight_factor(self, num_targets: Tensor) -> Tensor:
        """The targets of the update over its weights, known when its last micro-batch was seen."""
        weights = sum_over_ranks(torch.stack(self._weights_of_update).sum())
        return torch.where(weights > 0, num_targets / weights, torch.ones_like(weights))

    def divide_by_weights(self, model: nn.Module, num_targets: Tensor) -> None:
        """Divide the gradients by the weights of the update instead of its targets."""
        factor = self.weight_factor(num_targets)
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad.mul_(factor)

    def validate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """The plain loss per target, whatever the batches."""
        model.eval()
        meter = SignalMeter()
        for batch in batches:
            with torch.no_grad():
                targets = measure_targets(model, batch)
            meter.add(sum_targets(targets, self.loss_deadline))
        figures = meter.drain()
        return {"eval_loss": figures["loss"], "eval_targets": figures["targets"]}

    def drain(self) -> dict[str, float]:
        """The figures of everything since the last call, for the log. All processes call it."""
        figures = self.meter.drain()
        if self.regulariser is not None:
            figures[self.regulariser.logged_as] = self.regulariser.mean.take(sum_over_ranks)
        return figures
