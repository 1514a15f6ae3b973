"""A real browser opens a heat map from disk: its switches, its card, its keys and its colours."""

import pytest

from tests.reports.conftest import ask_page
from yrunner.reports.heat_map import AFTER, BEFORE, SCALES, write_heat_map

CLICK = "const click = (value) => page.querySelector(`input[value='${value}']`).click();"
TARGETS = "const targets = [...page.querySelectorAll('.target')];"


@pytest.fixture(scope="module")
def path(heat_map, capitals_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("map") / "map.html"
    write_heat_map(heat_map, capitals_tokenizer, path)
    return path


def characters(heat_map, counts):
    """The places of the targets of each character, in each example's own count."""
    counts = iter(counts)
    for part in heat_map.examples:
        place, num_targets = 0, len(part.example.target_positions)
        while place < num_targets:
            count = next(counts)
            yield part, range(place, place + count)
            place += count


def heats(part, when, figure, places):
    """The number of the colour of a character: that of its hardest token."""
    scores = part.scores[when]
    hardest = max(places, key=lambda place: float(scores.loss_N[place]))
    value = float(f"{float(getattr(scores, f'{figure}_N')[hardest]):.4g}")
    return sum(value >= border for border in SCALES[figure][0])


def shifts(part, figure, places):
    """The number of the colour of a change: that of the token that changed most."""
    before, after = (
        [float(f"{value:.4g}") for value in getattr(part.scores[when], f"{figure}_N").tolist()]
        for when in (BEFORE, AFTER)
    )
    change = max((after[place] - before[place] for place in places), key=abs)
    return sum(abs(change) >= border for border in SCALES[figure][1]) * (1 if change > 0 else -1)


def test_every_switch_colours_every_target_as_the_figures_say(browser, path, heat_map, tmp_path):
    script = f"""{CLICK} {TARGETS}
      const found = {{ counts: targets.map((target) => Number(target.dataset.count)) }};
      for (const figure of ["loss", "entropy", "weight"]) {{
        for (const when of ["before", "after", "change"]) {{
          click(figure); click(when);
          found[`${{figure}} ${{when}}`] = targets.map((target) =>
            Number(target.dataset.heat ?? target.dataset.shift));
          found[`scales ${{figure}} ${{when}}`] = [...page.querySelectorAll(".scale")]
            .filter((scale) => scale.getClientRects().length).map((scale) => scale.innerText);
        }}
      }}
      return found;"""
    found = ask_page(browser, path, script, tmp_path)
    cells = list(characters(heat_map, found["counts"]))
    for figure in SCALES:
        for when in (BEFORE, AFTER):
            expected = [heats(part, when, figure, places) for part, places in cells]
            assert found[f"{figure} {when}"] == expected
            (scale,) = found[f"scales {figure} {when}"]
            assert f"< {SCALES[figure][0][0]}" in scale
        assert found[f"{figure} change"] == [shifts(part, figure, places) for part, places in cells]
        (scale,) = found[f"scales {figure} change"]
        assert f"< −{SCALES[figure][1][-1]:g}" in scale


def test_zones_are_told_by_lines_of_four_kinds(browser, path, tmp_path):
    script = f"""{TARGETS}
      const line = (target) => view.getComputedStyle(target);
      return targets.map((target) => [target.dataset.zone,
        line(target).textDecorationLine + " " + line(target).textDecorationStyle]);"""
    lines = {zone: line for zone, line in ask_page(browser, path, script, tmp_path)}
    assert lines == {
        "easy": "none solid",
        "learning": "underline dotted",
        "hard": "underline double",
        "refused": "underline wavy",
    }


@pytest.mark.parametrize("way", ["hover", "focus"])
def test_the_card_tells_every_token_of_a_character(browser, path, heat_map, tmp_path, way):
    show = {
        "hover": "target.dispatchEvent(new view.MouseEvent('mouseover', { bubbles: true }));",
        "focus": "target.focus();",
    }[way]
    script = f"""{TARGETS} const [target] = targets; {show}
      const card = page.getElementById("card");
      const tables = [...card.querySelectorAll("table")].map((table) => table.innerText);
      const inside = card.getBoundingClientRect().right <= view.innerWidth;
      return {{ said: card.querySelector(".said").innerText, tables, inside,
        described: target.getAttribute("aria-describedby"), title: page.title }};"""
    card = ask_page(browser, path, script, tmp_path)
    assert card["said"] == "根"
    assert card["inside"]
    assert card["described"] == "card"
    assert card["title"].endswith(": tokens"), "no script of the data has run"
    scores = heat_map.examples[0].scores
    assert len(card["tables"]) == 3
    for place, table in enumerate(card["tables"]):
        assert f"token {place + 1} / 3" in table
        for when in (BEFORE, AFTER):
            assert f"{float(scores[when].loss_N[place]):.3g}" in table
    assert "half a character" in card["tables"][0]
    assert "✓" in card["tables"][0]
    assert "✗" in card["tables"][1]


def test_keys_walk_through_the_targets_and_escape_closes_the_card(browser, path, tmp_path):
    script = f"""{TARGETS}
      const card = page.getElementById("card");
      const press = (key) => page.activeElement.dispatchEvent(
        new view.KeyboardEvent("keydown", {{ key, bubbles: true }}));
      const at = () => targets.indexOf(page.activeElement);
      const stops = targets.filter((target) => target.tabIndex === 0).length;
      targets[0].focus();
      press("ArrowLeft");
      const places = [at()];
      press("ArrowRight"); press("ArrowRight"); places.push(at());
      press("ArrowLeft"); places.push(at());
      const open = !card.hidden;
      press("Escape");
      const again = targets.filter((target) => target.tabIndex === 0).length;
      return {{ places, open, closed: card.hidden, stops, again }};"""
    walked = ask_page(browser, path, script, tmp_path)
    assert walked == {"places": [0, 2, 1], "open": True, "closed": True, "stops": 2, "again": 2}


def test_the_page_speaks_english_or_chinese_and_never_both(browser, path, tmp_path):
    script = f"""{CLICK}
      return ["en", "zh-Hans"].map((language) => {{
        click(language);
        return page.body.innerText;
      }});"""
    english, chinese = ask_page(browser, path, script, tmp_path)
    for shown, hidden in ((english, chinese), (chinese, english)):
        assert "根据《港口法典》，" in shown
        assert shown != hidden
    assert "Grey text is context" in english
    assert "灰色文字是上下文" in chinese
    assert "灰色文字" not in english
    assert "Grey text" not in chinese


@pytest.mark.parametrize("mode", [(), ("--force-dark-mode",)])
def test_light_and_dark_follow_the_system(browser, path, tmp_path, mode):
    script = f"""{TARGETS}
      const brightness = (element, property) => view.getComputedStyle(element)[property]
        .match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0);
      const faint = targets.find((target) => target.dataset.heat === "0");
      const strong = targets.find((target) => target.dataset.heat === "6");
      return [page.body, faint, strong].map((part) => brightness(part, "backgroundColor"));"""
    page, faint, strong = ask_page(browser, path, script, tmp_path, *mode)
    if mode:
        assert page < 150
        assert faint < strong
    else:
        assert page > 600
        assert faint > strong


def test_a_phone_never_scrolls_the_page_sideways_even_with_the_card_open(browser, path, tmp_path):
    script = f"""{TARGETS}
      return targets.map((target) => {{
        target.focus();
        return page.documentElement.scrollWidth;
      }});"""
    assert set(ask_page(browser, path, script, tmp_path, width=375)) == {375}
