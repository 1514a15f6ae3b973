"""Draw figures as SVG that follows the page's light or dark colours.

Drawn with matplotlib's objects alone (no pyplot, no global state). The same numbers give the same
text, so two reports can be compared as files. It is imported when something is drawn: a training
runs without its 20 MB.
"""

import io
import re
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The drawn colour is the fallback, readable on white and on black; a report replaces it with the
# variable `--plot-<name>`. Each must be unique: the SVG is searched for it.
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
LAYOUT: Literal["constrained"] | None = "constrained"
"""Fits the margins to the labels."""


def new_figure(height_inches: float = HEIGHT_INCHES) -> "Figure":
    """A figure as wide as a page."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH_INCHES, height_inches), layout=LAYOUT)


def empty_plot(name: str) -> str:
    """A placeholder for a plot without data."""
    figure = new_figure(height_inches=1.2)
    figure.text(0.5, 0.5, "no data", ha="center", va="center", color=THEME["ink"])
    return svg_of(figure, name)


def add_legend(figure: "Figure", num_columns: int = 4) -> None:
    """A legend above the axes."""
    figure.legend(
        frameon=False, labelcolor=THEME["ink"], loc="outside upper center", ncols=num_columns
    )


def label_steps(axes: Any, y_label: str) -> None:
    """Label the axes of a plot over optimizer steps."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    label_axes(axes, "optimizer step", y_label)


def label_percent(axis: Any) -> None:
    """Show the shares on an axis as percentages."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(xmax=1))


def label_log_percent(axis: Any) -> None:
    """The same where the axis is logarithmic, at the places that matplotlib labels."""
    from matplotlib.ticker import LogFormatter

    class LogPercent(LogFormatter):
        def __call__(self, share: float, position: int | None = None) -> str:
            return f"{100 * share:g}%" if super().__call__(share, position) else ""

    axis.set_major_formatter(LogPercent())
    axis.set_minor_formatter(LogPercent(labelOnlyBase=False))


def label_axes(axes: Any, x_label: str, y_label: str) -> None:
    """Label the axes and remove lines that carry no number."""
    axes.set_xlabel(x_label, color=THEME["ink"])
    axes.set_ylabel(y_label, color=THEME["ink"])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=THEME["grid"], alpha=0.6)
    axes.tick_params(color=THEME["grid"], labelcolor=THEME["ink"], length=0, which="both")
    axes.grid(axis="y", color=THEME["grid"], alpha=0.35, linewidth=0.7)
    axes.set_axisbelow(True)


def svg_of(figure: "Figure", name: str) -> str:
    """The figure as one `<svg>` element without size, fonts, date or external references."""
    from matplotlib import rc_context

    settings = {"svg.fonttype": "none", "svg.hashsalt": f"yrunner-{name}"}
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    text = io.StringIO()
    with rc_context(settings):
        figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    return _for_page(text.getvalue())


def _for_page(svg: str) -> str:
    """Fit the SVG to a page: its width, font and colours, without ids that could clash."""
    svg = re.sub(r"<!--.*?-->\n?", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", '<svg font-family="sans-serif" ', 1)
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    # Groups have the same ids in every figure, and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for name, colour in THEME.items():
        svg = svg.replace(colour, f"var(--plot-{name}, {colour})")
    return svg.strip()
