"""Histograms of the targets between two logs, counted on the device."""

# N = targets, F = figures of a target, B = bins

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yrunner.distributed.collectives import min_max_over_ranks, sum_over_ranks
from yrunner.losses.targets import Targets, TokenWeight

BINS = 64
"""Bins of a histogram; one more takes what lies above them."""
LOSS_BIN = ENTROPY_BIN = 0.25
"""Width of a bin in nats: the bins reach to 16, beyond the loss where refusing begins."""
FIGURES = ("loss", "entropy", "weight", "gradient")
"""What is counted of each target; the gradient is `Targets.gradient_N`."""


@dataclass(frozen=True)
class Histogram:
    """One histogram, under the names that `SummaryWriter.add_histogram_raw` gives to its parts."""

    min: float
    max: float
    num: float
    sum: float
    sum_squares: float
    bucket_limits: list[float]
    """Upper border of each bin, which begins at the one before, the first at 0."""
    bucket_counts: list[float]


class TargetHistograms:
    """Counts into fixed bins, without waiting for the device or keeping a target.

    What is not a finite number is in no histogram: `loss` and `refused` of the log show it.
    """

    def __init__(self, weight: TokenWeight) -> None:
        # Half of the bins reach to the highest weight, rounded to a power of two so that dividing
        # by a width is exact. All of them hold the gradients: at most sqrt(2) times the weight.
        weight_bin = 2 ** round(math.log2(highest_weight(weight))) / (BINS / 2)
        self.widths = (LOSS_BIN, ENTROPY_BIN, weight_bin, weight_bin)
        self._counts: _Counts | None = None

    def add(self, targets: Targets) -> None:
        """Count the targets of one micro-batch."""
        figures = (targets.loss_N, targets.entropy_N, targets.weight_N, targets.gradient_N)
        in_bins = zip(figures, self.widths, strict=True)
        counts = _count(torch.stack([figure_N.double() / width for figure_N, width in in_bins]))
        self._counts = counts if self._counts is None else self._counts.plus(counts)

    def state_dict(self) -> dict[str, Any]:
        """What was counted since the last `drain`, for a checkpoint."""
        return {"counts": None if self._counts is None else self._counts.as_lists()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state["counts"] is not None:
            parts = (torch.tensor(part, dtype=torch.float64) for part in state["counts"])
            self._counts = _Counts(*parts)

    def drain(self) -> dict[str, Histogram]:
        """The histograms of everything added since the last call, by the names of `FIGURES`.

        A figure of which no target has a number is left out. All of it is of all processes, which
        have to call this together.
        """
        if self._counts is None:
            return {}
        counts = self._counts.of_all_ranks()
        by_figure = zip(FIGURES, self.widths, *counts.as_lists(), strict=True)
        self._counts = None
        return {
            name: Histogram(
                min=lowest * width,
                max=highest * width,
                num=sum(counts),
                sum=total * width,
                sum_squares=squares * width**2,
                bucket_limits=[*(width * (place + 1) for place in range(BINS)), sys.float_info.max],
                bucket_counts=counts,
            )
            for name, width, counts, lowest, highest, total, squares in by_figure
            if sum(counts)
        }


def highest_weight(weight: TokenWeight) -> float:
    """The highest of the weights on a grid of losses and entropies; 1 where all of them are 0."""
    nats = torch.arange(BINS, dtype=torch.float64) * LOSS_BIN
    loss_N, entropy_N = torch.cartesian_prod(nats, nats).unbind(dim=1)
    return float(weight.of(loss_N, entropy_N).max()) or 1.0


@dataclass(frozen=True)
class _Counts:
    """What has been counted of each figure, on the device, in widths of a bin."""

    counts_FB: Tensor
    lowest_F: Tensor
    highest_F: Tensor
    sum_F: Tensor
    squares_F: Tensor

    def plus(self, other: "_Counts") -> "_Counts":
        """Both together."""
        device = other.sum_F.device
        if self.sum_F.device != device:
            return _Counts(*(part.to(device) for part in vars(self).values())).plus(other)
        return _Counts(
            self.counts_FB + other.counts_FB,
            torch.minimum(self.lowest_F, other.lowest_F),
            torch.maximum(self.highest_F, other.highest_F),
            self.sum_F + other.sum_F,
            self.squares_F + other.squares_F,
        )

    def of_all_ranks(self) -> "_Counts":
        """What all processes have counted together."""
        lowest_F, highest_F = min_max_over_ranks(self.lowest_F, self.highest_F)
        return _Counts(
            sum_over_ranks(self.counts_FB),
            lowest_F,
            highest_F,
            sum_over_ranks(self.sum_F),
            sum_over_ranks(self.squares_F),
        )

    def as_lists(self) -> list[list[Any]]:
        """The figures one after the other. Waits for the device."""
        return [part.tolist() for part in vars(self).values()]


def _count(values_FN: Tensor) -> _Counts:
    """Count values, in widths of a bin."""
    # NaN columns: min() of an empty tensor would raise.
    values_FN = torch.cat([values_FN, values_FN.new_full((len(values_FN), 1), math.nan)], dim=1)
    no_number_FN = ~values_FN.isfinite()
    number_FN = values_FN.masked_fill(no_number_FN, 0)
    # Ones and zeros are added up, for bincount would wait for the device.
    counts_FB = values_FN.new_zeros(len(values_FN), BINS + 1)
    place_FN = number_FN.floor().clamp(0, BINS).long()
    counts_FB.scatter_add_(1, place_FN, (~no_number_FN).to(values_FN.dtype))
    return _Counts(
        counts_FB,
        values_FN.masked_fill(no_number_FN, math.inf).amin(dim=1),
        values_FN.masked_fill(no_number_FN, -math.inf).amax(dim=1),
        number_FN.sum(dim=1),
        number_FN.square().sum(dim=1),
    )
