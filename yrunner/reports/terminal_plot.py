"""A histogram of losses with their weights on a terminal: one bin per line, one colour per zone."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.text import Text

ZONE_STYLES = {"easy": "green", "learning": "cyan", "hard": "yellow", "refused": "red"}
NAMES = ("zone", "loss", "targets", "", "weight", "")
NAME_STYLE = "bold"
EIGHTHS = ("", *"▏▎▍▌▋▊▉█")
NARROWEST, WIDEST = 72, 120
"""Columns of the whole plot."""
WEIGHT_BAR = 14
BESIDE_BARS = 46
"""Columns of zone, loss, share and weight, with all gaps."""


@dataclass(frozen=True)
class ShareBar:
    """One bin: the share of the targets in it, and their weight."""

    zone: str
    label: str
    share: float
    weight: float | None
    """None where it is unknown."""


def weight_bars(bars: Sequence[ShareBar], columns: int) -> Text:
    """The bars as lines of text, as wide as `columns` within limits.

    The largest share and the largest weight have the longest bars.
    """
    room = min(max(columns, NARROWEST), WIDEST) - BESIDE_BARS - WEIGHT_BAR
    most = max((bar.share for bar in bars), default=0.0)
    heaviest = max((bar.weight or 0.0 for bar in bars), default=0.0)
    lines = [Text(_line(NAMES, room), NAME_STYLE)]
    zones = [None, *(bar.zone for bar in bars)]
    for bar, (above, zone) in zip(bars, pairwise(zones), strict=True):
        cells = (
            "" if zone == above else bar.zone,
            bar.label,
            f"{bar.share:.1%}",
            block_bar(bar.share, most, room),
            rounded_weight(bar.weight),
            block_bar(bar.weight or 0.0, heaviest, WEIGHT_BAR),
        )
        lines.append(Text(_line(cells, room), ZONE_STYLES[bar.zone]))
    return Text("\n").join(lines)


def rounded_weight(weight: float | None) -> str:
    """To three decimals; an exact 0 has none, an unknown weight is a dash."""
    if weight is None:
        return "–"
    return f"{weight:.3f}" if weight else "0"


def block_bar(value: float, most: float, room: int) -> str:
    """A bar of block characters, `room` of them for the value `most`; never empty above 0."""
    if value <= 0:
        return ""
    whole, eighths = divmod(max(1, round(8 * room * value / most)), 8)
    return EIGHTHS[-1] * whole + EIGHTHS[eighths]


def _line(cells: Sequence[str], room: int) -> str:
    zone, label, share, bar, weight, weight_bar = cells
    line = f"  {zone:<8}  {label:<12}  {share:>7}  {bar:<{room}}  {weight:>6}  {weight_bar}"
    return line.rstrip()
