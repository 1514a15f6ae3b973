"""What a run minimises: weighted target losses, plus a regulariser; and the sums to log."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, MutableSequence
from typing import Any, Literal

import torch
from torch import Tensor

from yrunner.data.batching.batches import Batch
from yrunner.distributed.collectives import sum_over_ranks
from yrunner.losses.fused_head import measure_targets
from yrunner.losses.targets import Targets, TokenWeight, sum_targets
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.drift import DriftGauge
from yrunner.training.histograms import TargetHistograms
from yrunner.training.metrics import SignalMeter
from yrunner.training.replay_loss import Regulariser
from yrunner.training.rng_snapshot import Stateful
from yrunner.training.spike_guard import SpikeGuard


class Objective(ABC):
    """The loss of an update, summed over micro-batches and ranks.

    Whatever an update is divided by is known before its first micro-batch: `begin_update`.
    """

    by_weights = False
    """Whether its gradients are multiplied by `gradient_factor` when it is complete."""

    def __init__(self, guard: SpikeGuard, meter: SignalMeter) -> None:
        self.guard = guard
        self.meter = meter
        self.histograms: TargetHistograms | None = None
        self.regulariser: Regulariser | None = None
        """Holds the model to its base; None without `keep`."""
        self.gauge: DriftGauge | None = None

    @property
    def sums(self) -> dict[str, Stateful]:
        """What adds up from update to update; see rng_snapshot.py for their attributes."""
        keep = self.regulariser and self.regulariser.mean
        sums = {"meter": self.meter, "guard": self.guard, "histograms": self.histograms}
        every = {**sums, "keep": keep}.items()
        return {name: each for name, each in every if isinstance(each, Stateful)}

    @abstractmethod
    def begin_update(
        self, model: Any, batches: MutableSequence[Batch], device: torch.device
    ) -> None:
        """Look at all micro-batches of this rank's next update. A collective call.

        `model` is the bare one, on `device`. May put other micro-batches in their place.
        """

    @abstractmethod
    def loss(self, model: Any, called: Any, batch: Batch) -> Tensor:
        """A micro-batch's part in the update's loss; adds its figures to the sums.

        `called` is `model` as accelerate has wrapped it; the batch is on its device.
        """

    def gradient_factor(self) -> Tensor:
        """See `by_weights`. A collective call."""
        return torch.ones(())

    @abstractmethod
    def alone(self, model: Any, batch: Batch) -> tuple[Tensor, float]:
        """The loss of a batch as an update of its own, and the figure to show; adds to no sums."""

    @abstractmethod
    def validate(self, model: Any, batches: Iterable[Batch]) -> dict[str, float]:
        """The figures of a validation, `eval_loss` among them, whatever the batches."""

    def drain(self) -> dict[str, float]:
        """The figures of everything since the last call, for the log. All processes call it."""
        figures = self.meter.drain()
        if self.regulariser is not None:
            figures[self.regulariser.logged_as] = self.regulariser.mean.take(sum_over_ranks)
        return figures


class TargetObjective(Objective):
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
        super().__init__(guard, SignalMeter())
        self.weight = weight
        self.loss_deadline = loss_deadline
        self.by_weights = normalize == "weights"
        """Whether an update is divided by the sum of its weights, and not by its targets."""
        self.histograms = histograms
        self._num_targets = torch.ones(())
        """Of the update, over all ranks."""
        self._weights_of_update: list[Tensor] = []

    def begin_update(
        self, model: Any, batches: MutableSequence[Batch], device: torch.device
    ) -> None:
        """Start the clock, and count the targets."""
        counts = [(batch["labels"] != IGNORE_INDEX).sum() for batch in batches]
        self._num_targets = sum_over_ranks(torch.stack(counts).sum().to(device))
        self._weights_of_update = []
        self.meter.start()

    def loss(self, model: Any, called: Any, batch: Batch) -> Tensor:
        """See `Objective`."""
        targets = measure_targets(called, batch, self.weight)
        self._add_figures(targets)
        return targets.weighted / self._num_targets

    def _add_figures(self, targets: Targets, judged: Targets | None = None) -> None:
        """Add the figures of a micro-batch; `judged`: what the guard looks at, if not the same."""
        if self.histograms is not None:
            self.histograms.add(targets)
        record_R = sum_targets(targets, self.loss_deadline)
        self.meter.add(record_R)
        self.guard.add(record_R if judged is None else sum_targets(judged, self.loss_deadline))
        self._weights_of_update.append(targets.weight_N.sum())

    def gradient_factor(self) -> Tensor:
        """The targets of the update over its weights, known when its last micro-batch was seen."""
        weights = sum_over_ranks(torch.stack(self._weights_of_update).sum())
        return torch.where(weights > 0, self._num_targets / weights, torch.ones_like(weights))

    def alone(self, model: Any, batch: Batch) -> tuple[Tensor, float]:
        """The summed loss, and its plain mean."""
        targets: Targets = measure_targets(model, batch, self.weight)
        return targets.weighted, float(targets.loss_N.double().mean())

    def validate(self, model: Any, batches: Iterable[Batch]) -> dict[str, float]:
        """The plain loss per target."""
        model.eval()
        meter = SignalMeter()
        for batch in batches:
            with torch.no_grad():
                targets = measure_targets(model, batch)
            meter.add(sum_targets(targets, self.loss_deadline))
        figures = meter.drain()
        return {"eval_loss": figures["loss"], "eval_targets": figures["targets"]}
