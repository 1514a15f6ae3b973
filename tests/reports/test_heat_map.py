"""The heat map is one harmless file that holds the text and the figures of every target."""

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from importlib.resources import files

import pytest
import torch

from tests.reports.conftest import ATTACK, scores_of
from tests.reports.test_html import Page
from yrunner.losses.nlirg import EASY_UP_TO, HARD_UP_TO, LEARNING_UP_TO
from yrunner.reports.heat_map import (
    AFTER,
    BEFORE,
    SCALES,
    ScoredExample,
    render_heat_map,
    summarize,
    write_heat_map,
)


@pytest.fixture(scope="module")
def page(heat_map, capitals_tokenizer):
    return render_heat_map(heat_map, capitals_tokenizer)


def figures_of(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page)
    return json.loads(text)


def test_the_text_of_every_example_is_there_and_stays_text(page, heat_map, capitals_tokenizer):
    parsed = Page(page)
    shown = "".join(parsed.texts)
    first, second = (
        capitals_tokenizer.decode(part.example.input_ids) for part in heat_map.examples
    )
    assert first.replace("\r\n", "\\r\n").replace("\n", "↵\n") in shown
    assert second.startswith("<|im_start|>user")
    assert r"\u202e\x1b[2J Dane." in shown
    assert f"capitals {ATTACK}" in shown
    assert "img" not in parsed.tags
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert not {"\x1b", "\u202e"} & set(page)


def test_the_page_asks_for_nothing_and_allows_its_own_script_only(page):
    parsed = Page(page)
    assert not {"link", "iframe", "object", "embed", "img"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name in ("src", "href", "srcset")]
    assert "@import" not in page
    assert "url(" not in page
    _, script = re.findall("<script.*?>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'\"" in page
    assert len(parsed.ids) == len(set(parsed.ids))


def test_the_figures_are_those_of_every_target_in_order(page, heat_map, capitals_tokenizer):
    figures = figures_of(page)
    for part, shown in zip(heat_map.examples, figures["examples"], strict=True):
        for when in (BEFORE, AFTER):
            scores = part.scores[when]
            found = shown[when]
            torch.testing.assert_close(
                torch.tensor(found["loss"]), scores.loss_N, rtol=1e-3, atol=0
            )
            assert found["agrees"] == [int(n % 3 == 0) for n in range(len(scores.loss_N))]
            assert [figures["zones"][zone] for zone in found["zone"]] == [
                "easy"
                if loss <= 1.45
                else "learning"
                if loss < 6.6
                else "hard"
                if loss < 15
                else "refused"
                for loss in scores.loss_N.tolist()
            ]
    counts = re.findall(r'class="target[^"]*" data-count="(\d)"', page)
    num_targets = sum(len(part.example.target_positions) for part in heat_map.examples)
    assert sum(map(int, counts)) == num_targets
    assert ">根</span>" in page
    assert ">😀</span>" in page


def test_means_are_those_of_all_targets_together(heat_map):
    pairs = [(part.example, part.scores[BEFORE]) for part in heat_map.examples]
    losses = [loss for _, scores in pairs for loss in scores.loss_N.tolist()]
    weights = [weight for _, scores in pairs for weight in scores.weight_N.tolist()]
    summary = summarize(pairs, loss_deadline=15.0)
    assert summary.num_targets == len(losses)
    assert summary.loss == pytest.approx(sum(losses) / len(losses))
    assert summary.weight == pytest.approx(sum(weights) / len(weights))
    right = sum(-(-len(scores.loss_N) // 3) for _, scores in pairs)
    assert summary.top == pytest.approx(right / len(losses))
    assert summary.zones[3] == pytest.approx(sum(loss >= 15 for loss in losses) / len(losses))
    assert sum(summary.zones) == pytest.approx(1)


def test_no_colour_of_the_loss_stands_for_two_zones():
    assert {EASY_UP_TO, LEARNING_UP_TO, HARD_UP_TO} <= set(SCALES["loss"][0])
    assert all(list(borders) == sorted(borders) for scale in SCALES.values() for borders in scale)
    assert {tuple(map(len, scale)) for scale in SCALES.values()} == {(6, 3)}


def test_the_zones_are_named_with_the_borders_of_the_recipe(heat_map, page, capitals_tokenizer):
    def zones(text):
        legend = re.search(r'<ul class="zones">(.*?)</ul>', text, re.DOTALL)[1]
        found = re.findall(r'<li><b data-zone="(\w+)">.*?</b>\s*(.*?)</li>', legend, re.DOTALL)
        return {zone: re.sub("<.*?>", " ", border).strip() for zone, border in found}

    assert zones(page)["learning"] == "1.45 – 6.6"
    assert zones(page)["refused"].startswith("from 15")
    early = zones(render_heat_map(replace(heat_map, loss_deadline=5.0), capitals_tokenizer))
    assert list(early) == ["easy", "learning", "refused"]
    assert early["learning"] == "1.45 – 5"


def test_one_model_alone_offers_no_change_and_what_is_odd_is_said(
    heat_map, capitals_tokenizer, tmp_path
):
    part = heat_map.examples[0]
    alone = ScoredExample(part.example, {AFTER: part.scores[AFTER]}, "it is too long")
    shown = replace(
        heat_map, models={AFTER: "outputs/x"}, examples=[alone], other_settings=["loss.kind"]
    )
    write_heat_map(shown, capitals_tokenizer, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert 'value="change"' not in page
    assert 'value="before"' not in page
    assert "it is too long" in page
    assert "loss.kind" in page
    assert "Total" not in page


def test_a_loss_that_is_no_number_is_shown_as_none(heat_map, capitals_tokenizer):
    example = heat_map.examples[1].example
    scores = scores_of(example, 5)
    scores.loss_N[0], scores.loss_N[1] = math.nan, math.inf
    broken = replace(heat_map, examples=[ScoredExample(example, {BEFORE: scores})])
    broken = replace(broken, models={BEFORE: "base"})
    (shown,) = figures_of(render_heat_map(broken, capitals_tokenizer))["examples"]
    assert shown[BEFORE]["loss"][:2] == [None, None]
    assert shown[BEFORE]["zone"][:2] == [3, 3]


def luminance(colour: str) -> float:
    """Of `#rrggbb`, as WCAG defines it."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("is_dark", [False, True])
def test_every_text_on_a_colour_can_be_read_and_a_higher_colour_is_never_fainter(is_dark):
    style = files("yrunner.reports").joinpath("heat_map.css").read_text("utf-8")
    colours: dict[str, str] = {}
    for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)[: 2 if is_dark else 1]:
        colours |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    colours["on-middle"] = colours["on-deep" if is_dark else "on-pale"]
    rules = re.findall(
        r"\{ background: var\(--((?:heat|fell)-\d)\); color: var\(--([\w-]+)\)", style
    )
    assert len(rules) == 10
    for background, ink in rules:
        low, high = sorted(luminance(colours[name]) for name in (background, ink))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (background, ink)
    for name in ("heat", "fell"):
        steps = [luminance(colours[key]) for key in sorted(colours) if key.startswith(name)]
        assert steps == sorted(steps, reverse=not is_dark)
