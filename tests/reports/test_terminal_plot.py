"""Lines of text that read without colour, keep to their width, and never round a share away."""

import pytest
from rich.text import Text

from yrunner.reports.terminal_plot import (
    NARROWEST,
    WIDEST,
    ZONE_STYLES,
    ShareBar,
    block_bar,
    rounded_weight,
    weight_bars,
)

BARS = [
    ShareBar("easy", "0 to 1", 0.999, 0.2),
    ShareBar("easy", "1 to 2", 0.001, 0.6),
    ShareBar("learning", "2 to 3", 0.0, None),
    ShareBar("refused", "16 and above", 0.0, 0.0),
]


@pytest.mark.parametrize("columns", [10, 72, 80, 100, 120, 500])
def test_every_line_keeps_to_the_width(columns: int) -> None:
    width = min(max(columns, NARROWEST), WIDEST)
    lines = weight_bars(BARS, columns).plain.split("\n")
    assert len(lines) == 1 + len(BARS)
    assert max(map(len, lines)) <= width
    # The longest bar of the shares takes all its room.
    assert lines[1].count("█") > width - 65


def test_each_zone_is_named_once_where_it_begins() -> None:
    lines = weight_bars(BARS, 80).plain.split("\n")
    assert [line.split()[0] for line in lines] == ["zone", "easy", "1", "learning", "refused"]
    assert [line.split()[-1] for line in lines[3:]] == ["–", "0"]


def test_each_line_has_the_colour_of_its_zone() -> None:
    spans = weight_bars(BARS, 80).split("\n")
    styles = [line.spans[0].style if isinstance(line, Text) else None for line in spans]
    assert styles[1:] == [ZONE_STYLES[bar.zone] for bar in BARS]


@pytest.mark.parametrize(
    ("value", "bar"),
    [(0, ""), (1e-9, "▏"), (0.5, "████"), (0.51, "████▏"), (0.99, "███████▉"), (1, "████████")],
)
def test_a_bar_is_exact_to_an_eighth_and_shows_the_smallest_share(value: float, bar: str) -> None:
    assert block_bar(value, 1.0, 8) == bar


def test_a_weight_of_zero_is_told_from_a_small_and_from_an_unknown_one() -> None:
    assert [rounded_weight(weight) for weight in (0.0, 1e-9, 0.1234, None)] == [
        "0",
        "0.000",
        "0.123",
        "–",
    ]


def test_no_bars_are_a_head_line() -> None:
    assert weight_bars([], 80).plain.split() == ["zone", "loss", "targets", "weight"]
