"""The plots of an experiment: the arms' curves, and what they learned against what they forgot.

Each arm has its own colour and marker, the same in all plots; the order of a mapping decides which.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yrunner.reports.svg import (
    THEME,
    add_legend,
    empty_plot,
    label_axes,
    label_percent,
    label_steps,
    new_figure,
    svg_of,
)

# Readable on white and on black, and distinct under common colour blindness as far as ten colours
# can be; none is in THEME, which the page replaces.
COLOURS = (
    *("#2f7fd1", "#d9702b", "#2f9e5b", "#c9485b", "#8a63d2"),
    *("#a5822f", "#cf62a6", "#74901f", "#1f98a6", "#85796f"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LEGEND_COLUMNS = 3


@dataclass(frozen=True)
class CurvePoint:
    """A figure of an arm at a step: mean, lowest and highest over the seeds."""

    step: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class PlanePoint:
    """What an arm has forgotten and learned at a step, as shares of the questions."""

    forgetting: float
    domain: float


def curves_of_arms(
    curves: Mapping[str, Sequence[CurvePoint]], y_label: str, *, is_share: bool = True
) -> str:
    """A figure of every arm over the steps; a band spans the lowest to the highest seed."""
    name = f"curves_of_arms {y_label}"
    if not any(curves.values()):
        return empty_plot(name)
    figure = new_figure()
    axes = figure.subplots()
    for arm, points, style in _styled(curves):
        steps = [point.step for point in points]
        axes.plot(steps, [point.mean for point in points], label=arm, linewidth=1.6, **style)
        lows, highs = [point.low for point in points], [point.high for point in points]
        axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.12, linewidth=0)
    if is_share:
        label_percent(axes.yaxis)
    label_steps(axes, y_label)
    add_legend(figure, _LEGEND_COLUMNS)
    return svg_of(figure, name)


def forgetting_plane(
    arms: Mapping[str, Sequence[PlanePoint]], base: PlanePoint, domain_accuracy: float
) -> str:
    """Domain against forgetting: one point per arm and checkpoint, larger for the last.

    Up is learned, left is forgotten; the base is a star. The line marks the domain accuracy at
    which arms are compared.
    """
    figure = new_figure(height_inches=4.6)
    axes = figure.subplots()
    for arm, points, style in _styled(arms):
        places = [(point.forgetting, point.domain) for point in points]
        x, y = zip(*places, strict=True)
        axes.plot(x, y, label=arm, linewidth=1.1, alpha=0.75, **style)
        axes.plot(*places[-1], linestyle="", **{**style, "markersize": 10})
    star: dict[str, Any] = {"marker": "*", "markersize": 15, "color": THEME["ink"], "linestyle": ""}
    axes.plot(base.forgetting, base.domain, label="base", **star)
    axes.axhline(domain_accuracy, color=THEME["grid"], linewidth=1, linestyle="--")
    for axis in (axes.xaxis, axes.yaxis):
        label_percent(axis)
    label_axes(axes, "general side, tuned minus base", "domain side, answered exactly")
    add_legend(figure, _LEGEND_COLUMNS)
    return svg_of(figure, "forgetting_plane")


def _styled(arms: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, Sequence[Any], Any]]:
    """The arms that have points, each with its colour and marker."""
    for number, (arm, points) in enumerate(arms.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        if points:
            yield arm, points, {"color": colour, "marker": marker, "markersize": 4.5}
