"""Pictures of an experiment: one colour and marker per arm, whichever others have points."""

import re
import xml.etree.ElementTree as ElementTree

from yrunner.reports.comparison_plots import (
    COLOURS,
    CurvePoint,
    PlanePoint,
    curves_of_arms,
    forgetting_plane,
)
from yrunner.reports.svg import THEME

CURVE = [CurvePoint(step, step / 40, step / 50, step / 30) for step in (0, 10, 20)]
PATH = [PlanePoint(-0.1 * n, 0.2 * n) for n in range(4)]
BASE = PlanePoint(0.0, 0.0)


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.text]


def test_curves_name_their_arms_and_their_axes():
    words = texts(curves_of_arms({"plain": CURVE, "nlirg": CURVE}, "domain"))
    assert {"plain", "nlirg", "domain", "optimizer step"} <= set(words)
    assert any("%" in word for word in words)


def test_losses_are_no_shares():
    words = texts(curves_of_arms({"plain": CURVE}, "validation loss", is_share=False))
    assert not any("%" in word for word in words)


def test_an_arm_keeps_its_colour_when_another_has_no_points():
    whole = curves_of_arms({"a": CURVE, "b": CURVE, "c": CURVE}, "domain")
    gap = curves_of_arms({"a": CURVE, "b": [], "c": CURVE}, "domain")
    assert all(COLOURS[number] in whole for number in range(3))
    assert COLOURS[2] in gap
    assert COLOURS[1] not in gap
    assert "b" not in texts(gap)


def test_no_points_at_all_say_so():
    assert "no data" in texts(curves_of_arms({"a": []}, "domain"))


def test_the_plane_has_every_arm_the_base_and_a_large_last_point():
    plane = forgetting_plane({"plain": PATH, "none": [], "nlirg": PATH[:1]}, BASE, 0.5)
    words = set(texts(plane))
    assert {"plain", "nlirg", "base"} <= words
    assert "none" not in words
    uses = re.findall(rf"<use [^>]*fill: {COLOURS[0]}", plane)
    assert len(uses) == len(PATH) + 2, "its path, its last point once more, its legend"


def test_more_arms_than_colours_are_told_apart_by_markers():
    arms = {f"arm{number}": CURVE for number in range(12)}
    assert {f"arm{number}" for number in range(12)} <= set(texts(curves_of_arms(arms, "domain")))


def test_the_same_numbers_give_the_same_text_and_colours_that_the_page_leaves_alone():
    arms = {"plain": PATH, "nlirg": PATH}
    assert forgetting_plane(arms, BASE, 0.5) == forgetting_plane(arms, BASE, 0.5)
    assert not set(COLOURS) & set(THEME.values())
    assert len(set(COLOURS)) == len(COLOURS)
