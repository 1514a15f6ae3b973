"""What every picture of a report is drawn on: SVG that follows the page's light or dark colours.

Drawn with matplotlib's objects alone (no pyplot, no global state). The same numbers always give
the same text, so that two reports can be compared as files.

What was learned and what was forgotten, one curve above the other, as SVG text.

The pictures of a run's report, as SVG text; see drawing.py.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from math import isfinite
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter, StrMethodFormatter

# The colour that is drawn is the fallback, readable on white and on black; inside a report the
# variable `--plot-<name>` takes its place. Each must be unique: the SVG is searched for them.
THEME = {
    "ink": "#7a808a",
    "grid": "#9aa0aa",
    "loss": "#3b82c4",
    "weighted": "#c9793b",
    "validation": "#3f9d6e",
    "before": "#8d93a0",
    "after": "#7f6bd0",
    "easy": "#4fa98c",
    "learning": "#5b8dc9",
    "hard": "#d7a13f",
    "refused": "#cf5f56",
}

WIDTH_INCHES, HEIGHT_INCHES = 7.6, 3.4


def new_figure(height_inches: float = HEIGHT_INCHES) -> Figure:
    """A figure as wide as a page."""
    return Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")


def empty_picture(name: str) -> str:
    """What stands in the place of a picture that has nothing to show."""
    figure = new_figure(height_inches=1.2)
    figure.text(0.5, 0.5, "no records", ha="center", va="center", color=THEME["ink"])
    return svg_of(figure, name)


def add_legend(figure: Figure, num_columns: int = 4) -> None:
    """Name everything that has a label, above the axes."""
    figure.legend(
        frameon=False, labelcolor=THEME["ink"], loc="outside upper center", ncols=num_columns
    )


def label_steps(axes: Any, y_label: str) -> None:
    """Name the axes where the lower one counts updates."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    label_axes(axes, "optimizer step", y_label)


def label_axes(axes: Any, x_label: str, y_label: str) -> None:
    """Name the axes and take away every line that carries no number."""
    axes.set_xlabel(x_label, color=THEME["ink"])
    axes.set_ylabel(y_label, color=THEME["ink"])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=THEME["grid"], alpha=0.6)
    axes.tick_params(color=THEME["grid"], labelcolor=THEME["ink"], length=0, which="both")
    axes.grid(axis="y", color=THEME["grid"], alpha=0.35, linewidth=0.7)
    axes.set_axisbelow(True)


def svg_of(figure: Figure, name: str) -> str:
    """The figure as one `<svg>` element without size, fonts, date or outside reference."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": f"yrunner-{name}"}
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    text = io.StringIO()
    with matplotlib.rc_context(settings):
        figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    return _for_page(text.getvalue())


def _for_page(svg: str) -> str:
    """Fit the SVG to a page: its width, its font, its colours, and no name that meets another's."""
    svg = re.sub(r"<!--.*?-->\n?", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", '<svg font-family="sans-serif" ', 1)
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    # Groups are called alike in every figure, and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for name, colour in THEME.items():
        svg = svg.replace(colour, f"var(--plot-{name}, {colour})")
    return svg.strip()


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


Record = Mapping[str, Any]
"""One line of a run's metrics: `step`, and any of the keys that the trainer logs."""

ZONES = ("easy", "learning", "hard", "refused")

_MOST_POINTS = 500
_HIGHEST_LOSS = 16.0
_STROKES = ("-", "--", ":")


def loss_curves(records: Sequence[Record]) -> str:
    """Plain, weighted and validation loss over the steps; a long curve is smoothed."""
    figure = new_figure()
    axes = figure.subplots()
    drawn = [
        _draw_curve(axes, _series(records, "loss"), "loss", "loss"),
        _draw_curve(axes, _series(records, "weighted_loss"), "weighted loss", "weighted"),
    ]
    validation = _series(records, "eval_loss")
    if validation:
        steps, losses = zip(*validation, strict=True)
        axes.plot(steps, losses, "o-", color=THEME["validation"], label="validation loss")
    if not any(drawn) and not validation:
        return empty_picture("loss_curves")
    label_steps(axes, "loss (nats per target)")
    add_legend(figure)
    return svg_of(figure, "loss_curves")


def zones_over_time(records: Sequence[Record]) -> str:
    """The shares of easy, learning, hard and refused targets, stacked, over the steps."""
    keys = [f"zone_{zone}" for zone in ZONES]
    rows = [
        (float(record["step"]), *(float(record[key]) for key in keys))
        for record in records
        if all(_is_number(record.get(key)) for key in ("step", *keys))
    ]
    if not rows:
        return empty_picture("zones_over_time")
    if len(rows) == 1:
        # An area needs a width: one record is drawn as a block around its step.
        step, *shares = rows[0]
        rows = [(step - 0.5, *shares), (step + 0.5, *shares)]
    steps, *shares_of_zones = zip(*_thinned(rows), strict=True)
    figure = new_figure()
    axes = figure.subplots()
    colours = [THEME[zone] for zone in ZONES]
    axes.stackplot(steps, shares_of_zones, labels=ZONES, colors=colours, alpha=0.85, linewidth=0)
    axes.set(xlim=(steps[0], steps[-1]), ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    label_steps(axes, "share of the targets")
    add_legend(figure)
    return svg_of(figure, "zones_over_time")


def learning_rate(records: Sequence[Record]) -> str:
    """The learning rate over the steps."""
    points = _series(records, "learning_rate")
    if not points:
        return empty_picture("learning_rate")
    figure = new_figure(height_inches=2.4)
    axes = figure.subplots()
    marker = "o" if len(points) == 1 else ""
    axes.plot(*zip(*_thinned(points), strict=True), color=THEME["loss"], marker=marker)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")
    label_steps(axes, "learning rate")
    return svg_of(figure, "learning_rate")


def weight_curve(
    losses_N: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    *,
    zone_edges: Sequence[float],
    before: Sequence[float] = (),
    after: Sequence[float] = (),
) -> str:
    """The weight of a token by its loss; under it, how the tokens' losses lay before and after.

    `curves` are the weights at `losses_N`, from 0 to 16 nats, by the name of each curve.
    `zone_edges` are the three losses between the zones. `before` and `after` are losses of
    tokens; those above 16 nats are counted in the last bar.
    """
    points = {
        name: [
            point for point in zip(losses_N, weights_N, strict=True) if all(map(_is_number, point))
        ]
        for name, weights_N in curves.items()
    }
    groups = {"before": _within_scale(before), "after": _within_scale(after)}
    groups = {name: losses for name, losses in groups.items() if losses}
    if not any(points.values()) and not groups:
        return empty_picture("weight_curve")
    figure = new_figure(height_inches=4.6 if groups else HEIGHT_INCHES)
    ratios = [3, 2] if groups else [1]
    rows = figure.subplots(len(ratios), sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    _draw_weights(rows[0], points)
    _draw_zones(rows, zone_edges, groups)
    if groups:
        _draw_histogram(rows[1], groups)
    label_axes(rows[-1], "loss of the token (nats)", "share of the tokens" if groups else "weight")
    label_axes(rows[0], "" if groups else "loss of the token (nats)", "weight")
    return svg_of(figure, "weight_curve")


def _draw_weights(axes: Any, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """The curves, told apart by their strokes; one alone needs no name."""
    for (name, points), stroke in zip(curves.items(), cycle(_STROKES)):
        if points:
            style = {"color": THEME["ink"], "linewidth": 2, "linestyle": stroke}
            axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set(xlim=(0, _HIGHEST_LOSS), ylim=(0, None))
    if len(curves) > 1:
        axes.legend(frameon=False, labelcolor=THEME["ink"], loc="upper right")


def _draw_zones(rows: Any, edges: Sequence[float], groups: Mapping[str, Any]) -> None:
    """Shade the four zones in every row, and write into the first what share each one holds."""
    bounds = [0.0, *(min(edge, _HIGHEST_LOSS) for edge in edges), _HIGHEST_LOSS]
    shares = [_zone_shares(losses, edges) for losses in groups.values()]
    shares_by_zone = zip(*shares, strict=True) if shares else [()] * len(ZONES)
    for zone, (start, end), shares_of_zone in zip(
        ZONES, pairwise(bounds), shares_by_zone, strict=True
    ):
        if start == end:
            continue
        for axes in rows:
            axes.axvspan(start, end, color=THEME[zone], alpha=0.13, linewidth=0)
        held = " → ".join(f"{share:.0%}" for share in shares_of_zone)
        rows[0].annotate(
            f"{zone}\n{held}".strip(),
            ((start + end) / 2, 1.02),
            xycoords=("data", "axes fraction"),
            **{"ha": "center", "va": "bottom", "fontsize": 9, "color": THEME[zone]},
        )


def _zone_shares(losses: Sequence[float], edges: Sequence[float]) -> list[float]:
    """The share of the losses in each zone; an easy loss may equal its edge, no other may."""
    easy_up_to, learning_up_to, hard_up_to = edges
    zones = [
        (loss > easy_up_to) + (loss >= learning_up_to) + (loss >= hard_up_to) for loss in losses
    ]
    return [zones.count(zone) / len(zones) for zone in range(len(ZONES))]


class _LogPercent(LogFormatter):
    """Shares on a logarithmic axis, at the places that matplotlib would label."""

    def __call__(self, share: float, position: int | None = None) -> str:
        return f"{100 * share:g}%" if super().__call__(share, position) else ""


def _draw_histogram(axes: Any, groups: Mapping[str, Sequence[float]]) -> None:
    # Nearly all tokens are easy; on a linear scale the few hard ones could not be seen.
    axes.set_yscale("log")
    styles = {
        "before": {"histtype": "step", "linewidth": 1.6, "color": THEME["before"]},
        "after": {"histtype": "stepfilled", "alpha": 0.55, "color": THEME["after"]},
    }
    for name, losses in groups.items():
        weights = [1 / len(losses)] * len(losses)
        bars = {"bins": 64, "range": (0, _HIGHEST_LOSS), "weights": weights}
        axes.hist(losses, label=f"{name} training", **bars, **styles[name])
    axes.yaxis.set_major_formatter(_LogPercent())
    axes.yaxis.set_minor_formatter(_LogPercent(labelOnlyBase=False))
    axes.legend(frameon=False, labelcolor=THEME["ink"], loc="upper right")


def _draw_curve(axes: Any, points: list[tuple[float, ...]], label: str, colour: str) -> bool:
    """One curve; a long one is drawn faint, with its running mean over it."""
    if not points:
        return False
    thinned = _thinned(points)
    steps, values = zip(*thinned, strict=True)
    style: dict[str, Any] = {"color": THEME[colour], "linewidth": 1.8}
    if len(points) == 1:
        style["marker"] = "o"
    if len(points) >= 60:
        axes.plot(steps, values, color=THEME[colour], linewidth=0.9, alpha=0.3)
        values = _running_mean(values, len(values) // 20)
    axes.plot(steps, values, label=label, **style)
    return True


def _running_mean(values: Sequence[float], reach: int) -> tuple[float, ...]:
    """The mean of each value and its neighbours up to `reach` away; fewer at both ends."""
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return tuple(map(fmean, windows))


def _series(records: Sequence[Record], key: str) -> list[tuple[float, ...]]:
    """(step, value) of every record that has both as finite numbers."""
    return [
        (float(record["step"]), float(record[key]))
        for record in records
        if _is_number(record.get("step")) and _is_number(record.get(key))
    ]


def _thinned(rows: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """At most 500 rows: neighbours are averaged, so that a long run keeps a small report."""
    size = math.ceil(len(rows) / _MOST_POINTS)
    groups = (rows[start : start + size] for start in range(0, len(rows), size))
    return [
        tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups
    ]


def _within_scale(losses: Sequence[float]) -> list[float]:
    return [min(float(loss), _HIGHEST_LOSS) for loss in losses if not math.isnan(loss)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
