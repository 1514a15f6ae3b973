"""The recipe's `train.spikes`: what counts as a sudden jump of the loss, and what follows."""

from typing import Literal

from pydantic import Field

from yrunner.recipe.section import Section


class Spikes(Section):
    """A loss far above those of the updates before it."""

    window: int = Field(100, ge=10)
    """Updates that a loss is compared with. The first of a run, a tenth of a window, are not."""
    deviations: float = Field(10.0, gt=0)
    """Distance from their median, in standard deviations that outliers do not move (1.48 times the
    median distance, and a twentieth of the median at the least)."""
    action: Literal["warn", "stop", "ignore"] = "warn"
    """stop: before the optimizer moves, as at a loss that is not a number."""
