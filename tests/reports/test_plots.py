"""Pictures never fail, never differ for the same numbers, and follow the page's colours."""

import math
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest

from yrunner.reports.plots import learning_rate, loss_curves, weight_curve, zones_over_time
from yrunner.reports.svg import THEME

EDGES = (1.45, 6.6, 15.0)
GRID = [index / 10 for index in range(161)]
CURVE = {"nlirg": GRID}
OVER_TIME = (loss_curves, zones_over_time, learning_rate)


def record(step, **changes):
    usual = {
        "step": step,
        "loss": 3 / step,
        "weighted_loss": 2 / step,
        "zone_easy": 0.5,
        "zone_learning": 0.3,
        "zone_hard": 0.15,
        "zone_refused": 0.05,
        "learning_rate": 1e-4,
    }
    return {**usual, **changes}


def texts(svg):
    """All words of the picture; reading it also proves that it is well-formed."""
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.text]


@pytest.mark.parametrize("plot", OVER_TIME)
@pytest.mark.parametrize("num_records", [1, 2, 3, 59, 60, 61, 1234])
def test_any_number_of_records_is_drawn(plot, num_records):
    words = texts(plot([record(step) for step in range(1, num_records + 1)]))
    assert "optimizer step" in words
    assert "no data" not in words


@pytest.mark.parametrize("plot", OVER_TIME)
@pytest.mark.parametrize(
    "records",
    [
        [],
        [{}],
        [{"step": 1}],
        [{"loss": 1.0, "learning_rate": 1.0, "zone_easy": 1.0}],
        [record(1, loss=math.nan, weighted_loss=math.inf, learning_rate=None, zone_easy=math.nan)],
        [record(1, loss="1.0", weighted_loss=None, learning_rate="x", zone_hard=None)],
    ],
)
def test_records_without_usable_numbers_say_so(plot, records):
    assert "no data" in texts(plot(records))


def test_a_nan_in_the_middle_leaves_the_rest_of_the_curve():
    records = [record(step, loss=math.nan if step == 2 else 1.0) for step in (1, 2, 3)]
    assert "no data" not in texts(loss_curves(records))


def test_validation_alone_is_drawn():
    assert "validation loss" in texts(loss_curves([{"step": 5, "eval_loss": 1.0}]))


def test_under_plain_loss_the_same_curve_is_drawn_once():
    rows = [{"step": step, "loss": 1.0, "weighted_loss": 1.0} for step in (1, 2)]
    assert "weighted loss" not in texts(loss_curves(rows))
    assert "weighted loss" in texts(loss_curves([*rows, {"step": 3, "weighted_loss": 0.4}]))


def test_a_legend_names_only_what_was_logged():
    words = texts(loss_curves([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]))
    assert "loss" in words
    assert "weighted loss" not in words


def test_a_long_run_keeps_a_small_picture():
    assert len(zones_over_time([record(step) for step in range(1, 20_000)])) < 150_000


def test_the_weight_curve_shows_the_share_of_each_zone_before_and_after():
    before = [1.45, 1.46, 6.6, 15.0]
    after = [0.0, 0.1, 1.0, 99.0, math.nan]
    words = texts(weight_curve(GRID, CURVE, zone_edges=EDGES, before=before, after=after))
    shown = [word for word in words if "→" in word]
    assert shown == ["25% → 75%", "25% → 0%", "25% → 0%", "25% → 25%"]
    assert {"easy", "learning", "hard", "refused", "before training"} <= set(words)


@pytest.mark.parametrize(
    "groups",
    [{}, {"before": [1.0]}, {"after": [math.nan]}, {"before": [math.inf], "after": [20.0, -0.0]}],
)
def test_a_weight_curve_with_few_losses_is_drawn(groups):
    for curve in ([], [0.5], GRID):
        svg = weight_curve(curve, {"flat": [0.5] * len(curve)}, zone_edges=EDGES, **groups)
        assert texts(svg)


def test_several_curves_are_named_and_told_apart_without_colour():
    curves = {f"entropy {nats} nats": [nats / 9] * len(GRID) for nats in range(3)}
    svg = weight_curve(GRID, curves, zone_edges=EDGES)
    assert set(curves) <= set(texts(svg))
    assert len(set(re.findall(r"stroke-dasharray: [^;\"]*", svg))) >= 2
    assert not set(CURVE) & set(texts(weight_curve(GRID, CURVE, zone_edges=EDGES)))


def test_a_zone_without_room_is_not_named():
    words = texts(weight_curve(GRID, CURVE, zone_edges=(1.45, 5.0, 5.0), before=[1.0, 7.0]))
    assert "refused" in words
    assert "hard" not in words


def test_a_deadline_beyond_the_scale_is_drawn_at_its_end():
    svg = weight_curve(GRID, CURVE, zone_edges=(1.45, 6.6, 20.0), after=[16.5, 21.0])
    assert "hard" in texts(svg)


def test_the_same_numbers_give_the_same_text():
    records = [record(step) for step in range(1, 80)]
    for plot in OVER_TIME:
        assert plot(records) == plot(records)
    curves = [weight_curve(GRID, CURVE, zone_edges=EDGES, before=[1, 2, 3]) for _ in range(2)]
    assert curves[0] == curves[1]


def test_every_colour_follows_the_page_and_stands_alone_too():
    svg = loss_curves([record(1), record(2)]) + weight_curve(GRID, CURVE, zone_edges=EDGES)
    for name in ("ink", "grid", "loss", "weighted", "easy", "refused"):
        assert f"var(--plot-{name}, {THEME[name]})" in svg
    fixed = set(re.findall(r"(?<!, )#[0-9a-f]{6}\b", svg))
    assert not fixed - {"#000000"}


def test_a_picture_fits_its_frame_and_carries_no_date_font_or_script():
    svg = loss_curves([record(1), record(2)])
    assert re.match(r"<svg [^>]*viewBox=", svg)
    assert not re.search(r"<svg[^>]* (width|height)=", svg)
    for unwanted in ("<?xml", "<!--", "metadata", "DejaVu", "<script", "<style", "@font-face"):
        assert unwanted not in svg


def test_drawing_leaves_matplotlibs_global_state_alone():
    before = dict(matplotlib.rcParams)
    loss_curves([record(1)])
    assert dict(matplotlib.rcParams) == before
