"""What was learned and what was forgotten, one curve above the other, as SVG text."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from yrunner.reports.drawing import THEME, label_axes, label_steps, new_figure, svg_of

HEIGHT_INCHES = 4.0


def drift_curve(records: Sequence[Mapping[str, Any]]) -> str:
    """The validation loss and the drift over the steps, of the validations that measured both."""
    rows = [row for row in records if "eval_drift" in row and "eval_loss" in row]
    figure = new_figure(height_inches=HEIGHT_INCHES)
    upper, lower = figure.subplots(2, sharex=True)
    for axes, key, colour in ((upper, "eval_loss", "validation"), (lower, "eval_drift", "hard")):
        points = [(row["step"], row[key]) for row in rows if isfinite(row[key])]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=THEME[colour])
        axes.set_ylim(bottom=0)
    label_axes(upper, "", "validation loss")
    label_steps(lower, "drift (nats per token)")
    return svg_of(figure, "drift_curve")
