"""The plots of a run's report, as SVG text."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from statistics import fmean
from typing import Any

from yrunner.reports.svg import (
    HEIGHT_INCHES,
    THEME,
    add_legend,
    empty_plot,
    label_axes,
    label_log_percent,
    label_percent,
    label_steps,
    new_figure,
    svg_of,
)

Record = Mapping[str, Any]
"""A line of a run's metrics: `step`, and any keys that the trainer logs."""

ZONES = ("easy", "learning", "hard", "refused")

_MOST_POINTS = 500
HIGHEST_LOSS = 16.0
_STROKES = ("-", "--", ":")


def loss_curves(records: Sequence[Record], unit: str = "nats per target") -> str:
    """Plain, weighted and validation loss over the steps; a long curve is smoothed."""
    figure = new_figure()
    axes = figure.subplots()
    plain, weighted = _series(records, "loss"), _series(records, "weighted_loss")
    drawn = [_draw_curve(axes, plain, "loss", "loss")]
    if weighted and weighted != plain:  # else every weight is 1, and one curve would hide the other
        drawn.append(_draw_curve(axes, weighted, "weighted loss", "weighted"))
    validation = _series(records, "eval_loss")
    if validation:
        steps, losses = zip(*validation, strict=True)
        axes.plot(steps, losses, "o-", color=THEME["validation"], label="validation loss")
    if not any(drawn) and not validation:
        return empty_plot("loss_curves")
    label_steps(axes, f"loss ({unit})")
    add_legend(figure)
    return svg_of(figure, "loss_curves")


def rollout_curves(records: Sequence[Record]) -> str:
    """The mean reward of answers above the shares that teach nothing or were cut off."""
    reward, validation = _series(records, "reward"), _series(records, "eval_reward")
    if not reward and not validation:
        return empty_plot("rollout_curves")
    figure = new_figure(height_inches=4.0)
    above, below = figure.subplots(2, sharex=True)
    _draw_curve(above, reward, "reward", "loss")
    if validation:
        shape = zip(*validation, strict=True)
        above.plot(*shape, "o-", color=THEME["validation"], label="validation", clip_on=False)
    for name, colour in (("equal_groups", "learning"), ("truncated", "refused")):
        points = _series(records, name)
        if points:
            _draw_curve(below, points, name.replace("_", " "), colour)
    below.set_ylim(0, 1)
    label_percent(below.yaxis)
    label_axes(above, "", "reward")
    label_steps(below, "share")
    add_legend(figure)
    return svg_of(figure, "rollout_curves")


def critic_curves(records: Sequence[Record]) -> str:
    """The critic's loss above the share of the returns' variance that it explains."""
    losses, explained = _series(records, "value_loss"), _series(records, "explained_variance")
    figure = new_figure(height_inches=4.0)
    above, below = figure.subplots(2, sharex=True)
    _draw_curve(above, losses, "value loss", "loss")
    if explained:
        _draw_curve(below, explained, "explained variance", "learning")
        below.set_ylim(max(-1.0, min(0.0, *(share for _, share in explained))), 1)
    label_percent(below.yaxis)
    label_axes(above, "", "value loss")
    label_steps(below, "explained")
    add_legend(figure)
    return svg_of(figure, "critic_curves")


def reward_curves(records: Sequence[Record]) -> str:
    """Reward accuracy above the log ratios of better and worse answers, over the steps."""
    accuracy = _series(records, "reward_accuracy")
    ratios = {
        "chosen": ("learning", _series(records, "chosen_log_ratio")),
        "rejected": ("refused", _series(records, "rejected_log_ratio")),
    }
    validation = _series(records, "eval_reward_accuracy")
    if not accuracy and not validation:
        return empty_plot("reward_curves")
    has_ratios = any(points for _, points in ratios.values())
    figure = new_figure(height_inches=4.0 if has_ratios else 2.4)
    rows = figure.subplots(1 + has_ratios, sharex=True, squeeze=False)[:, 0]
    _draw_curve(rows[0], accuracy, "accuracy", "loss")
    if validation:
        shape = zip(*validation, strict=True)
        rows[0].plot(*shape, "o-", color=THEME["validation"], label="validation", clip_on=False)
    rows[0].set_ylim(0, 1)
    label_percent(rows[0].yaxis)
    for label, (colour, points) in ratios.items():
        if points:
            _draw_curve(rows[-1], points, label, colour)
    if has_ratios:
        label_axes(rows[0], "", "reward accuracy")
        label_steps(rows[-1], "log ratio (nats)")
    else:
        label_steps(rows[0], "reward accuracy")
    add_legend(figure)
    return svg_of(figure, "reward_curves")


def zones_over_time(records: Sequence[Record]) -> str:
    """The shares of easy, learning, hard and refused targets, stacked, over the steps."""
    keys = [f"zone_{zone}" for zone in ZONES]
    rows = [
        (float(record["step"]), *(float(record[key]) for key in keys))
        for record in records
        if all(_is_number(record.get(key)) for key in ("step", *keys))
    ]
    if not rows:
        return empty_plot("zones_over_time")
    if len(rows) == 1:
        # An area needs a width: a single record is drawn as a block around its step.
        step, *shares = rows[0]
        rows = [(step - 0.5, *shares), (step + 0.5, *shares)]
    steps, *shares_of_zones = zip(*_thinned(rows), strict=True)
    figure = new_figure()
    axes = figure.subplots()
    colours = [THEME[zone] for zone in ZONES]
    axes.stackplot(steps, shares_of_zones, labels=ZONES, colors=colours, alpha=0.85, linewidth=0)
    axes.set(xlim=(steps[0], steps[-1]), ylim=(0, 1))
    label_percent(axes.yaxis)
    label_steps(axes, "share of the targets")
    add_legend(figure)
    return svg_of(figure, "zones_over_time")


def learning_rate(records: Sequence[Record]) -> str:
    """The learning rate over the steps."""
    points = _series(records, "learning_rate")
    if not points:
        return empty_plot("learning_rate")
    figure = new_figure(height_inches=2.4)
    axes = figure.subplots()
    marker = "o" if len(points) == 1 else ""
    axes.plot(*zip(*_thinned(points), strict=True), color=THEME["loss"], marker=marker)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")
    label_steps(axes, "learning rate")
    return svg_of(figure, "learning_rate")


def drift_curve(records: Sequence[Record]) -> str:
    """Validation loss above drift over the steps, for validations that measured both."""
    rows = [row for row in records if "eval_drift" in row and "eval_loss" in row]
    figure = new_figure(height_inches=4.0)
    upper, lower = figure.subplots(2, sharex=True)
    for axes, key, colour in ((upper, "eval_loss", "validation"), (lower, "eval_drift", "hard")):
        points = [(row["step"], row[key]) for row in rows if math.isfinite(row[key])]
        if points:
            # Not clipped: a marker on the edge would be cut in half.
            axes.plot(*zip(*points, strict=True), "o-", color=THEME[colour], clip_on=False)
            axes.set_ylim(0, 1.1 * max(value for _, value in points) or 1)
    label_axes(upper, "", "validation loss")
    label_steps(lower, "drift (nats per token)")
    return svg_of(figure, "drift_curve")


def teacher_curve(records: Sequence[Record]) -> str:
    """Divergence from the teacher over the steps, in training and in validation."""
    figure = new_figure()
    axes = figure.subplots()
    _draw_curve(axes, _series(records, "teacher_divergence"), "training rows", "loss")
    if points := _series(records, "eval_teacher_divergence"):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, "o-", color=THEME["validation"], label="validation rows")
    label_steps(axes, "divergence (nats per target)")
    add_legend(figure)
    return svg_of(figure, "teacher_curve")


def weight_curve(
    losses_N: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    *,
    zone_edges: Sequence[float],
    before: Sequence[float] = (),
    after: Sequence[float] = (),
) -> str:
    """The weight of a token by its loss, above the histograms of losses before and after training.

    `curves` are the weights at `losses_N`, from 0 to 16 nats, by name. `zone_edges` are the three
    losses between the zones. `before` and `after` are losses of tokens; those above 16 nats are
    counted in the last bar.
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
        return empty_plot("weight_curve")
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
    """The curves, with different strokes; a single one needs no legend."""
    for (name, points), stroke in zip(curves.items(), cycle(_STROKES)):
        if points:
            style = {"color": THEME["ink"], "linewidth": 2, "linestyle": stroke}
            axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set(xlim=(0, HIGHEST_LOSS), ylim=(0, None))
    if len(curves) > 1:
        axes.legend(frameon=False, labelcolor=THEME["ink"], loc="upper right")


def _draw_zones(rows: Any, edges: Sequence[float], groups: Mapping[str, Any]) -> None:
    """Shade the four zones in every row, and label them in the first with their shares."""
    bounds = [0.0, *(min(edge, HIGHEST_LOSS) for edge in edges), HIGHEST_LOSS]
    shares = [_zone_shares(losses, edges) for losses in groups.values()]
    shares_by_zone = zip(*shares, strict=True) if shares else [()] * len(ZONES)
    for zone, (start, end), shares_of_zone in zip(
        ZONES, pairwise(bounds), shares_by_zone, strict=True
    ):
        if start == end:
            continue
        for axes in rows:
            axes.axvspan(start, end, color=THEME[zone], alpha=0.13, linewidth=0)
        label = " → ".join(f"{share:.0%}" for share in shares_of_zone)
        rows[0].annotate(
            f"{zone}\n{label}".strip(),
            ((start + end) / 2, 1.02),
            xycoords=("data", "axes fraction"),
            **{"ha": "center", "va": "bottom", "fontsize": 9, "color": THEME[zone]},
        )


def _zone_shares(losses: Sequence[float], edges: Sequence[float]) -> list[float]:
    """The share of the losses in each zone; only the easy zone includes its upper edge."""
    easy_up_to, learning_up_to, hard_up_to = edges
    zones = [
        (loss > easy_up_to) + (loss >= learning_up_to) + (loss >= hard_up_to) for loss in losses
    ]
    return [zones.count(zone) / len(zones) for zone in range(len(ZONES))]


def _draw_histogram(axes: Any, groups: Mapping[str, Sequence[float]]) -> None:
    # Nearly all tokens are easy; a linear scale would hide the few hard ones.
    axes.set_yscale("log")
    styles = {
        "before": {"histtype": "step", "linewidth": 1.6, "color": THEME["before"]},
        "after": {"histtype": "stepfilled", "alpha": 0.55, "color": THEME["after"]},
    }
    for name, losses in groups.items():
        weights = [1 / len(losses)] * len(losses)
        bars = {"bins": 64, "range": (0, HIGHEST_LOSS), "weights": weights}
        axes.hist(losses, label=f"{name} training", **bars, **styles[name])
    label_log_percent(axes.yaxis)
    axes.legend(frameon=False, labelcolor=THEME["ink"], loc="upper right")


def _draw_curve(axes: Any, points: list[tuple[float, ...]], label: str, colour: str) -> bool:
    """One curve; a long one is faint, with its running mean on top."""
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
    """The mean of each value and its neighbours up to `reach` away."""
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return tuple(map(fmean, windows))


def _series(records: Sequence[Record], key: str) -> list[tuple[float, ...]]:
    """(step, value) of the records with finite numbers for both."""
    return [
        (float(record["step"]), float(record[key]))
        for record in records
        if _is_number(record.get("step")) and _is_number(record.get(key))
    ]


def _thinned(rows: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """At most 500 rows: neighbours are averaged, so a long run keeps a small report."""
    size = math.ceil(len(rows) / _MOST_POINTS)
    groups = (rows[start : start + size] for start in range(0, len(rows), size))
    return [
        tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups
    ]


def _within_scale(losses: Sequence[float]) -> list[float]:
    return [min(float(loss), HIGHEST_LOSS) for loss in losses if not math.isnan(loss)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
