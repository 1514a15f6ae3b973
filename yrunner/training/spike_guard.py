"""Judge every update before the optimizer steps: NaN, a spike, or zero weights."""

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from torch import Tensor

from yrunner.console import counted, warn
from yrunner.errors import RunError
from yrunner.losses.nlirg import ZONES
from yrunner.recipe.schema.recipe import Spikes
from yrunner.training.metrics import Figures, figures_of_targets

WEIGHTLESS = 5
"""Consecutive updates without any weight before a warning."""
DEVIATIONS_OF_MEDIAN_DISTANCE = 1.4826
"""Standard deviation of a normal distribution over its median distance from the median."""
SMALLEST_DEVIATION = 0.05
"""Share of the median: in a flat loss every ripple would be a spike."""
SMALLEST_JUMP = 0.25
"""Nats per target above the median: near a loss of zero, one hard row is no spike."""


class Exploded(RunError):
    """An update that must not be applied; weights and optimizer are unchanged."""

    def __init__(self, update: int, what: str, figures: dict[str, float]) -> None:
        super().__init__(f"update {update:,}: {what}; the optimizer step was not taken")
        self.update = update
        self.what = what
        self.figures = figures


class SpikeGuard:
    """Sums up the records of one update, and judges it when it is complete."""

    def __init__(
        self,
        spikes: Spikes,
        figures_of: Callable[[Sequence[float]], Figures] = figures_of_targets,
    ) -> None:
        """`figures_of`: from the summed records of an update to its figures."""
        self.spikes = spikes
        self.figures_of = figures_of
        self.losses: list[float] = []
        """The plain losses of the last updates."""
        self.num_weightless = 0
        """Updates in a row in which every target had the weight 0."""
        self.warned_at: int | None = None
        """The update of the last warning of a spike: one in each window is enough."""
        self._sums_R: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in ("losses", "num_weightless", "warned_at")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        vars(self).update(state)

    def add(self, record_R: Tensor) -> None:
        """Add the record of one micro-step."""
        self._sums_R = record_R if self._sums_R is None else self._sums_R + record_R

    def take(self) -> Tensor:
        """The sums of the update, for `judge`; the next begins with none."""
        assert self._sums_R is not None, "nothing was added"
        sums_R, self._sums_R = self._sums_R, None
        return sums_R

    def judge(self, update: int, sums: Sequence[float], gradient_norm: float | None) -> None:
        """Warn, or raise `Exploded`, before update number `update` is made.

        `gradient_norm`: None where it may be infinite, which float16's scaling takes care of.
        """
        figures = self.figures_of(sums)
        if not figures["targets"]:
            return
        loss = figures["loss"]
        for name, value in (("loss", loss), ("weighted loss", figures.get("weighted_loss", 0.0))):
            if not math.isfinite(value):
                raise Exploded(update, f"the {name} is {value}", figures)
        if gradient_norm is not None and not math.isfinite(gradient_norm):
            raise Exploded(update, f"the norm of the gradient is {gradient_norm}", figures)
        self._look_for_a_spike(update, loss, figures)
        if "mean_weight" in figures:
            self._look_for_weight(update, figures)

    def _look_for_a_spike(self, update: int, loss: float, figures: dict[str, float]) -> None:
        before = self.losses
        if self.spikes.action != "ignore" and len(before) >= self.spikes.window // 10:
            usual, deviation = spread(before)
            if loss > usual + max(self.spikes.deviations * deviation, SMALLEST_JUMP):
                what = (
                    f"the loss jumps to {loss:.4g}; in the {counted(len(before), 'update')} before "
                    f"it was {usual:.4g} ± {deviation:.2g}"
                )
                if self.spikes.action == "stop":
                    raise Exploded(update, f"{what} (train.spikes)", figures)
                self._warn_of_a_spike(update, what)
        self.losses = [*before, loss][-self.spikes.window :]

    def _warn_of_a_spike(self, update: int, what: str) -> None:
        if self.warned_at is None or update - self.warned_at >= self.spikes.window:
            self.warned_at = update
            warn(
                f"update {update:,}: {what}. Further spikes are not shown for "
                f"{self.spikes.window} updates"
            )

    def _look_for_weight(self, update: int, figures: dict[str, float]) -> None:
        self.num_weightless = 0 if figures["mean_weight"] > 0 else self.num_weightless + 1
        if self.num_weightless == WEIGHTLESS:
            shares = ", ".join(f"{zone} {figures[f'zone_{zone}']:.0%}" for zone in ZONES)
            warn(
                f"update {update:,}: nothing was learned in {WEIGHTLESS} updates, every target has "
                f"weight 0 ({shares}). Look at the curve with yrun check --html, or set "
                "loss.kind to plain until the loss falls below loss_deadline"
            )


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Median and standard deviation, both as outliers leave them; see `Spikes.deviations`."""
    middle = median(values)
    distance = median(abs(value - middle) for value in values)
    return middle, max(
        DEVIATIONS_OF_MEDIAN_DISTANCE * distance, SMALLEST_DEVIATION * abs(middle), 1e-6
    )
