"""What the recipe's loss makes of a sample: the histogram of its losses, and their weights."""

# N = targets of the sample, B = bins of the histogram, G = bins or zones

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yrunner.commands.check_sample import Sample
from yrunner.commands.weight_curves import HIGHEST_LOSS
from yrunner.losses.nlirg import ZONES, zone_of

BIN_WIDTH = 1.0


@dataclass(frozen=True)
class LossBin:
    """Targets of about the same loss."""

    start: float
    end: float | None
    """None: the last bin has no end."""
    zone: str
    """The zone of the bin's middle."""
    share: float
    """Of all targets."""
    mean_weight: float | None
    """None where no target is."""


@dataclass(frozen=True)
class Zone:
    """How much of the targets, and of their weight, falls into one zone."""

    name: str
    start: float
    end: float | None
    share: float
    mean_weight: float | None
    weight_share: float
    """Share of the sum of all weights."""


@dataclass(frozen=True)
class Signal:
    """What a loss makes of a sample."""

    rows: int
    targets: int
    mean_weight: float
    refused: float
    """Share of the targets with a weight of 0."""
    bins: list[LossBin]
    zones: list[Zone]


def describe_sample(sample: Sample, edges: Sequence[float]) -> Signal:
    """The histogram of the losses and its zones, which meet at `edges`, with their weights."""
    loss_N = sample.loss_N
    # A weight that is not a number teaches nothing, see losses/per_token.py.
    weight_N = torch.where(sample.weight_N > 0, sample.weight_N, 0.0)
    starts = torch.arange(0, HIGHEST_LOSS + BIN_WIDTH, BIN_WIDTH, dtype=loss_N.dtype)
    zone_B = zone_of(starts + BIN_WIDTH / 2, edges[-1]).tolist()
    within_N = loss_N.nan_to_num(HIGHEST_LOSS, posinf=HIGHEST_LOSS).clamp(max=HIGHEST_LOSS)
    bin_N = (within_N / BIN_WIDTH).long()
    bin_shares = _shares(bin_N, weight_N, len(starts))
    bins = [
        LossBin(start, end, ZONES[zone], share, mean)
        for start, end, zone, (share, mean, _) in zip(
            starts.tolist(), [*starts.tolist()[1:], None], zone_B, bin_shares, strict=True
        )
    ]
    zone_shares = _shares(zone_of(loss_N, edges[-1]), weight_N, len(ZONES))
    zones = [
        Zone(name, start, end, *shares)
        for name, start, end, shares in zip(
            ZONES, [0.0, *edges], [*edges, None], zone_shares, strict=True
        )
    ]
    refused = float((weight_N == 0).double().mean())
    return Signal(sample.rows, len(loss_N), float(weight_N.mean()), refused, bins, zones)


def _shares(
    group_N: Tensor, weight_N: Tensor, num_groups: int
) -> list[tuple[float, float | None, float]]:
    """Of each group: its share of the targets, its mean weight, its share of all weight."""
    count_G = group_N.bincount(minlength=num_groups).tolist()
    weight_G = group_N.bincount(weight_N, minlength=num_groups).tolist()
    # All targets may be refused.
    total = sum(weight_G) or 1.0
    return [
        (count / len(group_N), weight / count if count else None, weight / total)
        for count, weight in zip(count_G, weight_G, strict=True)
    ]
