"""A real browser opens the board: everything shows, and nothing is said on its console."""

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from tests.commands.board.conftest import RunningBoard, needs_extra, record_line
from tests.reports.conftest import BROWSERS

CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    needs_extra,
    pytest.mark.skipif(not CHROMIUM, reason=f"no browser found: install one of {BROWSERS}"),
    pytest.mark.skipif(not find_spec("playwright"), reason="playwright is not installed"),
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        browser = player.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture(params=["en-US", "zh-CN"])
def page(board: RunningBoard, chromium: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The list of runs in a fresh browser; at the end nothing may have gone wrong."""
    context = chromium.new_context(locale=request.param)
    page, wrong = context.new_page(), []
    page.on("console", lambda said: wrong.append(said.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda asked: (
            asked.url.startswith((board.origin, "data:", "blob:")) or wrong.append(asked.url)
        ),
    )
    page.expected = []  # what a test provokes
    page.goto(board.address)
    page.wait_for_selector(".runs tbody tr")
    yield page
    context.close()
    assert [text for text in wrong if not any(part in text for part in page.expected)] == []


def open_at(page: Any, where: str, selector: str) -> None:
    page.goto(page.url.split("#")[0] + where)
    page.wait_for_selector(selector)


def test_the_list_has_every_run_and_the_address_no_token(page: Any, board: RunningBoard):
    assert page.url == f"{board.origin}/"
    rows = page.locator(".runs tbody tr")
    assert {row.split("\n")[0].strip() for row in rows.all_inner_texts()} == {"one", "two"}
    page.fill("input[type=search]", "plain")
    assert rows.count() == 1
    page.select_option("select", "running")
    assert rows.count() == 0 and page.locator(".empty").inner_text()


def test_curves_grow_while_a_run_writes(page: Any, board: RunningBoard):
    open_at(page, "#/run/two", ".charts canvas")
    assert page.locator(".charts figure").count() == 6
    path = board.root / "two" / "metrics.jsonl"
    before = path.read_text()
    step = 12 + before.count("\n")
    with path.open("a") as file:
        file.write(record_line(step, step))
    page.locator(".facts dd", has_text=str(step)).first.wait_for()
    said = page.locator(".charts .sr", has_text=f"loss: {3 / step:.4g}")
    said.wait_for(state="attached")


def test_every_place_shows_something(page: Any):
    for where, selector in {
        "#/run/one": ".charts canvas",
        "#/run/one/recipe": "pre",
        "#/run/one/text": "textarea",
        "#/run/one/answers": "textarea",
        "#/run/one/rows": "fieldset",
        "#/compare/one/two": ".charts canvas",
        "#/commands": "form",
    }.items():
        open_at(page, where, selector)
    open_at(page, "#/compare/one/two", "table")
    assert "loss.kind" in page.locator("table").first.inner_text()


def test_a_run_that_is_not_there_is_named_in_a_sentence(page: Any):
    page.expected.append("400 (Bad Request)")
    open_at(page, "#/run/nowhere", ".empty")
    assert page.locator(".empty").inner_text() == "there is no such run"


def test_a_page_of_a_run_is_shown_and_cannot_touch_the_board(page: Any):
    open_at(page, "#/run/one/sort", "iframe")
    assert "the sort" in page.frame_locator("iframe").locator("p").inner_text()
    page.expected.append('Blocked a frame with origin "null"')
    open_at(page, "#/run/one/report", "iframe")
    page.wait_for_timeout(300)
    assert page.title() != "owned"


def test_the_language_is_the_browsers_and_can_be_switched(page: Any):
    lang = page.locator("html").get_attribute("lang")
    title = page.locator("h1").inner_text()
    page.click("#language")
    page.locator(f"html:not([lang={lang}])").wait_for()
    assert {lang, page.locator("html").get_attribute("lang")} == {"en", "zh-CN"}
    page.reload()
    page.wait_for_selector(".runs tbody tr")
    assert page.locator("h1").inner_text() != title


def test_two_runs_are_chosen_with_the_keyboard(page: Any):
    boxes = page.locator(".runs input[type=checkbox]")
    for place in (0, 1):
        boxes.nth(place).focus()
        page.keyboard.press("Space")
    page.locator("a.push").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".charts canvas")
    assert "#/compare/" in page.url


def test_rows_are_dropped_and_edited_into_a_new_file(page: Any, board: RunningBoard):
    before = {path: path.read_bytes() for path in board.root.rglob("*") if path.is_file()}
    open_at(page, "#/run/one/rows", "fieldset")
    first = page.locator("section.card").filter(has_text="a.jsonl:1").first
    first.locator("input[value=edit]").check()
    first.locator("textarea").nth(1).fill("mended answer")
    second = page.locator("section.card").filter(has_text="a.jsonl:2").first
    second.locator("input[value=drop]").check()
    page.locator("button.main").click()
    page.locator(".card > p.small", has_text="-mended-1.log.jsonl").wait_for()
    made = {path for path in board.root.rglob("*") if path.is_file()} - before.keys()
    data = next(path for path in made if not path.name.endswith(".log.jsonl"))
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert {"instruction": "Q1?", "output": "mended answer"} in rows
    assert "Q2?" not in data.read_text() and "Q6?" not in data.read_text()
    assert all(path.read_bytes() == content for path, content in before.items())
    for path in made:
        path.unlink()


def test_a_share_of_a_cluster_is_kept_and_written(page: Any, board: RunningBoard):
    before = {path for path in board.root.rglob("*") if path.is_file()}
    open_at(page, "#/run/one/rows", "canvas.picture")
    lines = page.locator("table tbody tr")
    assert lines.count() == 2
    assert "茶叶" in lines.first.inner_text() and "Q3? → A3" in lines.first.inner_text()
    drawn = """canvas => { const data = canvas.getContext("2d")
      .getImageData(0, 0, canvas.width, canvas.height).data; return data.some(Boolean); }"""
    assert page.locator("canvas.picture").evaluate(drawn)
    assert page.locator("button.main").is_disabled()
    page.locator("thead input[type=number]").fill("50")
    page.locator("thead input[type=number]").press("Tab")
    inputs = page.locator("tbody input[type=number]")
    assert [inputs.nth(number).input_value() for number in (0, 1)] == ["50", "100"]
    page.locator("button.main").click()
    page.locator(".card > p.small", has_text=".log.jsonl").wait_for()
    made = {path for path in board.root.rglob("*") if path.is_file()} - before
    data = next(path for path in made if not path.name.endswith(".log.jsonl"))
    asked = [json.loads(line)["instruction"] for line in data.read_text().splitlines()]
    assert asked == ["Q2?", "Q5?", "Q1?"]
    for path in made:
        path.unlink()


def test_a_phone_never_scrolls_the_page_sideways(board: RunningBoard, chromium: Any, page: Any):
    page.set_viewport_size({"width": 375, "height": 800})
    for where in ("#/", "#/run/one", "#/run/one/rows", "#/run/one/answers", "#/commands"):
        open_at(page, where, "h1")
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, where


def test_both_languages_have_the_same_words(page: Any):
    script = """async () => {
      const { languages } = await import("/static/words.js");
      return Object.values(languages).map((words) => Object.entries(words).map(
        ([name, text]) => name + (text.match(/\\{\\d\\}/g) ?? []).sort().join("")).sort());
    }"""
    english, chinese = page.evaluate(script)
    parts = lambda words: sorted({word.partition("{")[0] for word in words})  # noqa: E731
    assert parts(english) == parts(chinese)


FIGURES = {
    "loss": [0.01, 16.0],
    "entropy": [0.5, 0.01],
    "weight": [0.1, 0.0],
    "zone": [0, 3],
    "top": ["A", "B"],
    "patterns": ["normal", "confident error"],
    "mean_loss": 8.0,
    "answer": "its own words",
}
TOKENS = [("<|user|>Q", True, 0), ("A", False, 1), ("<img src=x onerror=alert(1)>", False, 1)]
SCORED = {
    "tokens": [
        {"text": text, "special": special, "position": place, "length": 1, "targets": targets}
        for place, (text, special, targets) in enumerate(TOKENS)
    ],
    "models": {"base": {**FIGURES, "mean_loss": 9.0}, "tuned": FIGURES},
}
WRITTEN = {
    "answers": [{"text": "first", "stopped": True}, {"text": "second", "stopped": False}],
    "messages": [{"role": "user", "content": "Q"}],
}
"""What the worker answers (its own tests are in test_worker.py): here no model is loaded."""


def answer_without_a_model(route: Any) -> None:
    asked = route.request.post_data_json
    said = {"score": SCORED, "answers": WRITTEN, "attend": {"weights": [0.1, 0.9]}}[asked["do"]]
    route.fulfill(json=said if asked["id"] == "two" else {"error": "no"})


def test_a_scored_text_is_coloured_and_a_token_shows_what_it_looked_at(page: Any):
    page.route("**/api/ask", answer_without_a_model)
    open_at(page, "#/run/two/text", "textarea")
    for place, text in enumerate(("Q", "A x")):
        page.locator("textarea").nth(place).fill(text)
    page.click("button.main")
    tokens = page.locator(".tokens button")
    tokens.first.wait_for()
    assert [node.get_attribute("class") for node in tokens.all()] == [
        "heat-0",
        "heat-6 refused confident",
    ]
    assert "alert(1)" in tokens.nth(1).inner_text(), "data is shown as text"
    assert page.get_by_text("its own words").count() == 2
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.locator("[role=status] td", has_text="16").wait_for()
    page.locator(".tokens .seen-4").wait_for()
    assert page.locator(".tokens .seen-4").inner_text() == "A"
    page.locator(".card select").first.select_option("base")
    page.locator(".soft", has_text="9").first.wait_for()


def test_an_answer_is_mended_and_saved_as_a_row(page: Any, board: RunningBoard):
    page.route("**/api/ask", answer_without_a_model)
    open_at(page, "#/run/two/answers", "textarea")
    page.locator("textarea").first.fill("Q")
    page.click("button.main")
    page.locator(".card textarea").nth(2).fill("mended")
    page.locator("button[type=button]:not(.quiet):visible").nth(1).click()
    page.locator("#notice", has_text="two-saved.jsonl").wait_for()
    saved = board.root / "two-saved.jsonl"
    row = json.loads(saved.read_text())
    assert row["messages"] == [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "mended"},
    ]
    saved.unlink()


def test_a_page_that_nobody_sees_holds_no_connection(page: Any):
    hidden = """(hidden) => {
      Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    open_at(page, "#/run/two", ".charts canvas")
    with page.expect_event("requestfailed", lambda asked: "/events" in asked.url):
        page.evaluate(hidden, True)
    with page.expect_request("**/events?id=two"):
        page.evaluate(hidden, False)
