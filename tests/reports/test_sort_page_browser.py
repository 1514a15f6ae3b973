"""A real browser opens a sorted corpus from disk: points, list, an opened row, pairs."""

import json
import math
import random
import re
import time
from dataclasses import replace

import pytest
import torch

from tests.reports.conftest import ATTACK, ask_page, scores_of
from yrunner.reports.sort_page import (
    SCALES,
    SHARES,
    PageCluster,
    PageClusters,
    SideBySide,
    SortedRow,
    SortPage,
    TokensOfExample,
    pack_tokens,
    write_sort_page,
)
from yrunner.reports.token_text import TokenText, pieces_of
from yrunner.scoring.knn import NO_SUGGESTION, Lookup

WIDE = 1400
FIND = """const one = (selector) => page.querySelector(selector);
  const all = (selector) => [...page.querySelectorAll(selector)];
  const click = (selector) => one(selector).click();
  const search = (words) => {
    one("#search").value = words;
    one("#search").dispatchEvent(new view.Event("input", { bubbles: true }));
  };
  const places = () => all("#lines tr").map((line) => Number(line.dataset.row));
  const title = () => one("#panel h2").textContent;"""


@pytest.fixture(scope="module")
def example(tokenize):
    return tokenize("user Capital?", f"根据《港口法典》， Belo 😀 {ATTACK}\r\n<|im_end|>")


def make_row(number: int, chance: random.Random, heat_map: str | None) -> SortedRow:
    answer = ATTACK if number == 3 else "Belo"
    loss, entropy = chance.gammavariate(1, 0.6), chance.gammavariate(2, 0.2)
    return SortedRow(
        file="chat.jsonl",
        number=number + 1,
        text=f"问题 {number}: Capital of land {number * 7919 % 1000}? → {answer}",
        scores={"excess": loss - entropy, "similarity": chance.random(), "loss": loss},
        mean_loss=loss,
        mean_entropy=entropy,
        num_targets=chance.randint(1, 2000),
        dropped="excess is above 2 (sort.drop_above)" if loss - entropy > 2 else None,
        heat_map=heat_map,
        content=f"{number:016x}",
        mark="drop" if number == 9 else None,
    )


@pytest.fixture(scope="module")
def sort_page(example, capitals_tokenizer):
    """120 rows, of which every second one has a heat map."""
    packed = pack_tokens(
        [TokensOfExample(example, scores_of(example, 12))], TokenText(capitals_tokenizer)
    )
    chance = random.Random(5)
    rows = [make_row(number, chance, packed if number % 2 else None) for number in range(120)]
    texts = ("Selling oars costs 5 coins today", f"Selling oars costs 50 {ATTACK} coins today")
    return SortPage(
        title=f"chat {ATTACK}",
        score="excess",
        rows=rows,
        pairs=[SideBySide("conflict", (2, 5), texts, 0.9)],
        num_pairs={"conflict": 1},
        clusters=PageClusters(
            [number % 3 for number in range(120)],
            [(chance.random(), chance.random()) for _ in range(120)],
            [
                PageCluster(1, 40, 8, ["land", f"岛{ATTACK}"], [4, 7]),
                PageCluster(2, 40, 0, [], [2]),
                PageCluster(0, 40, 4, [], []),
            ],
        ),
    )


@pytest.fixture(scope="module")
def path(sort_page, tmp_path_factory):
    path = tmp_path_factory.mktemp("sorted") / "report.html"
    write_sort_page(sort_page, path)
    return path


def falling(rows, score, sign=1):
    """Places of rows, the most suspicious first."""
    return sorted(
        range(len(rows)), key=lambda place: -sign * float(f"{rows[place].scores[score]:.4g}")
    )


def test_the_list_begins_with_the_most_suspicious_rows_of_the_chosen_score(
    browser, path, sort_page, tmp_path
):
    script = f"""{FIND}
      const found = {{ excess: places() }};
      click("input[value=similarity]"); found.similarity = places();
      click("th[data-column=targets] button"); found.targets = places();
      click("th[data-column=targets] button"); found.fewest = places();
      click("#more-rows"); click("#more-rows"); found.all = places().length;
      found.more = one("#more-rows").hidden;
      return found;"""
    found = ask_page(browser, path, script, tmp_path, width=WIDE)
    rows = sort_page.rows
    assert found["excess"] == falling(rows, "excess")[:50]
    assert found["similarity"] == falling(rows, "similarity", -1)[:50]
    by_size = sorted(range(len(rows)), key=lambda place: rows[place].num_targets)
    assert found["fewest"] == by_size[:50]
    assert [rows[place].num_targets for place in found["targets"]] == [
        rows[place].num_targets for place in by_size[:-51:-1]
    ]
    assert (found["all"], found["more"]) == (len(rows), True)


def test_search_and_fate_narrow_the_list(browser, path, sort_page, tmp_path):
    script = f"""{FIND}
      const found = {{}};
      search("LAND 7919"); found.none = places();
      search("问题 :18 land"); found.one = places();
      search("chat.jsonl:4 img"); found.place = places();
      search(""); click("input[value=dropped]"); found.dropped = places();
      found.count = one("#num-found").textContent;
      click("input[value=kept]"); found.kept = one("#num-found").textContent;
      return found;"""
    found = ask_page(browser, path, script, tmp_path, width=WIDE)
    dropped = [place for place, row in enumerate(sort_page.rows) if row.dropped]
    assert dropped
    assert found["none"] == []
    assert found["one"] == [17]
    assert found["place"] == [3]
    assert sorted(found["dropped"]) == dropped
    assert found["count"] == str(len(dropped))
    assert found["kept"] == str(len(sort_page.rows) - len(dropped))


def test_a_cluster_lists_its_rows_and_opens_a_typical_one(browser, path, sort_page, tmp_path):
    script = f"""{FIND}
      const found = {{ lines: all("#clusters tr").map((line) => line.innerText) }};
      const drawn = () => {{
        const {{ width, height }} = one("#plane");
        return one("#plane").getContext("2d").getImageData(0, 0, width, height).data.join();
      }};
      found.picture = drawn().replaceAll(/[0,]/g, "").length > 0;
      const before = drawn();
      click("input[name=cluster][value='1']"); found.one = places();
      found.changed = drawn() !== before;
      click("input[name=cluster][value='0']"); found.none = one("#num-found").textContent;
      click("#clusters button.row"); found.title = title();
      click("input[name=cluster][value=all]"); found.all = one("#num-found").textContent;
      found.owned = page.title;
      return found;"""
    found = ask_page(browser, path, script, tmp_path, width=WIDE)
    assert "20 %" in found["lines"][0] and "land" in found["lines"][0]
    assert sort_page.rows[4].text in found["lines"][0]
    assert found["picture"] and found["changed"]
    assert sorted(found["one"]) == [place for place in range(120) if place % 3 == 1]
    assert (found["none"], found["all"]) == ("40", "120")
    assert found["title"] == "chat.jsonl:5" and found["owned"].endswith(": sorted")


def test_a_click_on_a_point_opens_the_row_that_lies_there(browser, path, sort_page, tmp_path):
    """Under a root both axes go from 0 to 6 % beyond the highest mean, inside the margins."""
    points = [[row.mean_entropy, row.mean_loss] for row in sort_page.rows]
    ends = [1.06 * max(values) for values in zip(*points, strict=True)]
    script = f"""{FIND}
      const canvas = one("#scatter");
      const {{ left, top, width, height }} = canvas.getBoundingClientRect();
      return {points}.map(([entropy, loss]) => {{
        canvas.dispatchEvent(new view.MouseEvent("click", {{
          clientX: left + 40 + Math.sqrt(entropy / {ends[0]}) * (width - 52),
          clientY: top + height - 34 - Math.sqrt(loss / {ends[1]}) * (height - 46),
          bubbles: true }}));
        return title();
      }});"""
    opened = ask_page(browser, path, script, tmp_path, width=WIDE)
    names = [f"{row.file}:{row.number}" for row in sort_page.rows]
    # The page knows the means to four figures: two rows may lie on one spot.
    assert sum(map(str.__eq__, opened, names)) >= 0.95 * len(names)


def test_an_opened_row_shows_its_tokens_its_scores_and_where_it_stands(
    browser, path, sort_page, example, tmp_path
):
    place = 17
    script = f"""{FIND}
      search("chat.jsonl:{place + 1}"); click("#lines button.row");
      const targets = all("#tokens .target");
      targets[0].focus();
      const heats = {{}};
      for (const figure of ["loss", "entropy", "excess"]) {{
        click(`input[name=figure][value=${{figure}}]`);
        heats[figure] = targets.map((target) => Number(target.dataset.heat));
      }}
      targets[0].focus();
      return {{ title: title(), heats, counts: targets.length, card: one("#card").innerText,
        scores: one("#scores").innerText, text: one("#tokens").textContent,
        zones: [...new Set(targets.map((target) => target.dataset.zone))],
        note: one(".without-map").hidden, dark: page.title }};"""
    found = ask_page(browser, path, script, tmp_path, width=WIDE)
    row = sort_page.rows[place]
    assert found["title"] == "chat.jsonl:18"
    assert "根据《港口法典》" in found["text"]
    assert found["note"]
    assert found["dark"].endswith(": sorted"), "no script of the data has run"
    losses = scores_of(example, 12).loss_N.tolist()
    # The first character is made of three tokens, and the hardest of them speaks for it.
    hardest = round(max(losses[:3]), 2)
    assert found["heats"]["loss"][0] == sum(hardest >= border for border in SCALES["loss"])
    assert f"{float(f'{hardest:.3g}'):g}" in found["card"]
    for value in row.scores.values():
        assert f"{float(f'{value:.3g}'):g}" in found["scores"].replace("−", "-")
    below = sum(other.scores["excess"] < row.scores["excess"] for other in sort_page.rows)
    share = math.floor(1000 * below / len(sort_page.rows)) / 10
    assert f"{share:g} %" in found["scores"]
    assert set(found["zones"]) <= {"normal", "lucky", "hard", "confident error"}


def test_a_token_tells_what_other_rows_say(browser, example, capitals_tokenizer, tmp_path):
    text = TokenText(capitals_tokenizer)
    suggested_N = torch.full((len(example.target_positions),), NO_SUGGESTION)
    # The first character is three tokens of a byte each; told is the first byte of another one.
    suggested_N[0] = example.input_ids[example.target_positions[3]]
    suggested_N[-1] = capitals_tokenizer.convert_tokens_to_ids("7")
    lookup = Lookup(torch.full((len(suggested_N),), 4.5), suggested_N, suggested_N)
    packed = pack_tokens([TokensOfExample(example, scores_of(example, 12), lookup)], text)
    scores = {"knn_loss": 4.5, "loss": 1.0}
    row = SortedRow(
        "chat.jsonl", 1, "Capital?", scores, 1.0, 1.0, len(suggested_N), None, packed, ""
    )
    path = tmp_path / "told.html"
    write_sort_page(SortPage("told", "knn_loss", [row], [], {}), path)
    script = f"""{FIND}
      click("#lines button.row");
      const targets = all("#tokens .target");
      const cards = [targets[0], targets[1], targets.at(-1)].map((target) => {{
        target.focus();
        return one("#card").innerText;
      }});
      return {{ cards, heats: [...new Set(targets.map((target) => target.dataset.heat))] }};"""
    found = ask_page(browser, path, script, tmp_path, width=WIDE)
    assert found["heats"] == [str(sum(border <= 4.5 for border in SCALES["knn_loss"]))]
    half, nothing, seven = (
        re.findall("prediction by nearest rows\\s+(.*)", card) for card in found["cards"]
    )
    assert half[0] == "half a character"
    assert set(nothing) == {"–"}
    assert seven == ["7"]
    assert all("4.5" in card for card in found["cards"])


def test_a_token_is_coloured_by_what_neither_model_nor_neighbours_expected(
    browser, example, capitals_tokenizer, tmp_path
):
    scores = scores_of(example, 12)
    generator = torch.Generator().manual_seed(5)
    knn_loss_N = 9 * torch.rand(len(scores.loss_N), generator=generator)
    nothing_N = torch.full((len(knn_loss_N),), NO_SUGGESTION)
    lookup = Lookup(knn_loss_N, nothing_N, nothing_N)
    packed = pack_tokens([TokensOfExample(example, scores, lookup)], TokenText(capitals_tokenizer))
    name = "cross-fit unexplained"
    row = SortedRow("chat.jsonl", 1, "Town?", {name: 4.5}, 1.0, 1.0, 12, None, packed, "")
    path = tmp_path / "unexplained.html"
    write_sort_page(SortPage("unexplained", name, [row], [], {}), path)
    script = f"""{FIND}
      search("chat.jsonl:1"); click("#lines button.row");
      return {{ colour: one("input[name=figure]:checked").value,
        heats: all("#tokens .target").map((target) => Number(target.dataset.heat)) }};"""
    found = ask_page(browser, path, script, tmp_path, width=WIDE)
    assert found["colour"] == "unexplained"
    lower = [min(pair) for pair in zip(scores.loss_N.tolist(), knn_loss_N.tolist(), strict=True)]
    expected = []
    # The page knows hundredths of a nat.
    losses = [
        (loss, round(low, 2)) for loss, low in zip(scores.loss_N.tolist(), lower, strict=True)
    ]
    for piece in pieces_of(example, TokenText(capitals_tokenizer)):
        if piece.num_targets:
            # Of the tokens of one character the hardest speaks for it.
            _, loss = max(losses[: piece.num_targets])
            expected.append(sum(loss >= border for border in SCALES["unexplained"]))
            del losses[: piece.num_targets]
    assert found["heats"] == expected


def test_a_row_without_heat_map_shows_its_text_and_says_so(browser, path, sort_page, tmp_path):
    script = f"""{FIND}
      search("chat.jsonl:17"); click("#lines button.row");
      return {{ text: one("#tokens").innerText, note: one(".without-map").innerText,
        legend: all(".with-map").filter((part) => !part.hidden).length }};"""
    found = ask_page(browser, path, script, tmp_path, width=WIDE)
    assert found["text"] == sort_page.rows[16].text
    assert "60 rows" in found["note"]
    assert found["legend"] == 0


def test_keys_walk_through_the_rows_of_the_list(browser, path, sort_page, tmp_path):
    script = f"""{FIND}
      const press = (element, key) => element.dispatchEvent(
        new view.KeyboardEvent("keydown", {{ key, bubbles: true }}));
      const opened = [title()];
      press(one("#scatter"), "ArrowRight"); opened.push(title());
      press(one("#scatter"), "ArrowLeft"); press(one("#scatter"), "ArrowLeft");
      opened.push(title());
      one("#lines button.row").focus();
      press(page.activeElement, "ArrowDown"); opened.push(title());
      opened.push(page.activeElement.textContent);
      click("#panel .next"); opened.push(title());
      click("#panel .previous"); opened.push(title());
      return opened;"""
    found = ask_page(browser, path, script, tmp_path, width=WIDE)
    first, second, third = (
        f"chat.jsonl:{sort_page.rows[place].number}"
        for place in falling(sort_page.rows, "excess")[:3]
    )
    assert found == [first, second, first, second, second, third, second]


def test_rows_are_marked_and_the_marks_are_saved_as_lines(browser, path, sort_page, tmp_path):
    """In the list, beside an opened row and in a pair; a second click takes the mark away."""
    script = f"""{FIND}
      const saved = [];
      view.URL.createObjectURL = (blob) => {{ saved.push(blob.type); return "#"; }};
      const marked = () => [one("#saving").hidden, one("#num-marked").textContent];
      const found = {{ first: marked(), dropped: view.linesOfMarks() }};
      search("chat.jsonl:4"); click('#lines tr[data-row="3"] button.mark.keep');
      found.pressed = all("button.mark").filter((button) => button.ariaPressed === "true")
        .map((button) => [Number(button.value), button.dataset.mark]);
      search("chat.jsonl:8"); click('#lines tr[data-row="7"] button.row');
      click("#panel button.mark.drop");
      found.opened = title();
      all(".pair button.mark.drop")[1].click();
      found.second = marked();
      click("input[value=marked]"); search(""); found.listed = places().sort();
      all(".pair button.mark.drop")[1].click();
      click("#save-marks");
      return {{ ...found, lines: view.linesOfMarks(), saved, last: marked() }};"""
    found = ask_page(browser, path, script, tmp_path, width=WIDE)
    # Row 10 was marked in the sort that the page shows.
    assert found["first"] == [False, "1"]
    assert [9, "drop"] not in found["pressed"], "the search hides its line"
    assert [3, "keep"] in found["pressed"]
    assert found["opened"] == "chat.jsonl:8"
    assert found["second"] == [False, "4"]
    assert found["listed"] == sorted([3, 5, 7, 9], key=str)
    lines = [json.loads(line) for line in found["lines"].splitlines()]
    assert lines == [
        {"file": "chat.jsonl", "row": row + 1, "mark": mark, "content": f"{row:016x}"}
        for row, mark in [(3, "keep"), (7, "drop"), (9, "drop")]
    ]
    assert found["saved"] == ["application/jsonl"]


def test_a_contradiction_shows_the_tokens_that_differ(browser, path, sort_page, tmp_path):
    texts = ("How many? → 7 coins", "What number? → 8 coins")
    note = "…How many? [7] / [8]"
    pair = SideBySide("contradiction", (2, 5), texts, 1.0, note)
    page = tmp_path / "pair.html"
    write_sort_page(replace(sort_page, pairs=[pair], num_pairs={"contradiction": 1}), page)
    script = f"""{FIND}
      return {{ text: one(".pair").innerText, marks: all(".pair button.mark").length }};"""
    found = ask_page(browser, page, script, tmp_path, width=WIDE)
    assert "rows that contradict each other" in found["text"]
    assert note in found["text"]
    assert all(text in found["text"] for text in texts)
    assert found["marks"] == 4


def test_the_page_says_how_many_of_the_worst_rows_are_probably_sound(
    browser, path, sort_page, tmp_path
):
    page = tmp_path / "sound.html"
    write_sort_page(replace(sort_page, worst_and_sound=(12, 5)), page)
    script = f"{FIND} return one('#list').innerText;"
    shown = ask_page(browser, page, script, tmp_path, width=WIDE)
    assert "Of the 12 most suspicious rows about 5 are probably sound" in shown
    shown = ask_page(browser, path, script, tmp_path, width=WIDE)
    assert "probably sound" not in shown


def test_pairs_stand_side_by_side_with_their_difference_marked(browser, path, tmp_path):
    script = f"""{FIND}
      const marks = all(".pair mark").map((mark) => mark.textContent);
      all(".pair button.row")[1].click();
      return {{ marks, opened: title(), text: one(".pair").innerText }};"""
    found = ask_page(browser, path, script, tmp_path, width=WIDE)
    assert found["marks"] == ["", f"0 {ATTACK}"]
    assert found["opened"] == "chat.jsonl:6"
    assert "conflicting answers" in found["text"]
    assert "90 %" in found["text"]


def test_the_page_speaks_english_or_chinese_and_never_both(browser, path, tmp_path):
    script = f"""{FIND}
      return ["en", "zh-Hans"].map((language) => {{
        click(`input[value=${{language}}]`);
        return page.body.innerText;
      }});"""
    english, chinese = ask_page(browser, path, script, tmp_path, width=WIDE)
    assert "Loss against entropy" in english
    assert "损失与熵" not in english
    assert "损失与熵" in chinese
    assert "Loss against entropy" not in chinese
    for shown in (english, chinese):
        assert "Capital of land" in shown


@pytest.mark.parametrize("mode", [(), ("--force-dark-mode",)])
def test_points_can_be_seen_in_the_light_and_in_the_dark(browser, path, tmp_path, mode):
    script = f"""{FIND}
      const sum = (parts) => parts.slice(0, 3).reduce((all, part) => all + Number(part), 0);
      const canvas = one("#scatter");
      const pen = canvas.getContext("2d");
      const {{ data }} = pen.getImageData(0, 0, canvas.width, canvas.height);
      const drawn = new Set();
      for (let place = 0; place < data.length; place += 4) {{
        if (data[place + 3] > 200) drawn.add(sum([...data.slice(place, place + 3)]));
      }}
      const back = view.getComputedStyle(one("figure")).backgroundColor.match(/\\d+/g);
      return [sum(back), Math.min(...drawn), Math.max(...drawn)];"""
    back, darkest, brightest = ask_page(browser, path, script, tmp_path, *mode, width=WIDE)
    if mode:
        assert back < 150
        assert brightest - back > 300
    else:
        assert back > 600
        assert back - darkest > 300


@pytest.mark.parametrize("width", [375, 800])
def test_a_narrow_window_never_scrolls_the_page_sideways_even_with_a_row_open(
    browser, path, tmp_path, width
):
    script = f"""{FIND}
      const before = one("#panel").hidden;
      click("#lines button.row");
      all("#tokens .target").slice(0, 5).forEach((target) => target.focus());
      return [before, one("#panel").hidden, page.documentElement.scrollWidth];"""
    found = ask_page(browser, path, script, tmp_path, width=width)
    assert found == [True, False, width]


def test_twenty_thousand_rows_answer_four_actions_within_a_second(
    browser, sort_page, tmp_path_factory
):
    """Timed from outside: the clock of a browser that only dumps a page stands still."""
    folder = tmp_path_factory.mktemp("many")
    chance = random.Random(7)
    packed = sort_page.rows[1].heat_map
    rows = [make_row(number, chance, packed if number < 2000 else None) for number in range(20_000)]
    path = folder / "report.html"
    write_sort_page(replace(sort_page, rows=rows), path)

    def measure(num_turns: int) -> float:
        script = f"""{FIND}
          const canvas = one("#scatter").getBoundingClientRect();
          for (let turn = 0; turn < {num_turns}; turn += 1) {{
            click(`input[value=${{turn % 2 ? "similarity" : "excess"}}]`);
            search(`land ${{turn}}`);
            click("#lines button.row");
            one("#scatter").dispatchEvent(new view.MouseEvent("click", {{
              clientX: canvas.left + 200, clientY: canvas.top + 200, bubbles: true }}));
            page.body.offsetHeight;
          }}
          return one("#num-found").textContent;"""
        start = time.monotonic()
        assert int(ask_page(browser, path, script, folder, width=WIDE).replace(",", "")) >= 20
        return time.monotonic() - start

    assert (measure(21) - measure(1)) / 20 < 1


def test_rows_are_coloured_by_their_share_of_less_suspicious_rows():
    assert list(SHARES) == sorted(SHARES)
    assert len(SHARES) == 4, "sort_plots.js and the legend have five colours"
