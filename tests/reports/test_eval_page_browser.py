"""A real browser opens an evaluation from disk: 2,000 answers of 4 models, searched and sorted."""

import pytest

from tests.reports.conftest import ATTACK, ask_page, console_of, dump_page
from tests.reports.test_eval_page import make_page
from yrunner.reports.eval_page import AnswerRow, TaskAnswers, write_eval_page

MODELS = ["base", "tuned", "third", "fourth"]
NUM_ROWS = 2_000
WATCH = """
  const cards = () => [...page.querySelectorAll("#list article")];
  const questions = () => cards().map((card) => card.querySelector("h3").textContent);
  const choose = (id, value) => {
    const box = page.getElementById(id);
    box.value = value;
    box.dispatchEvent(new view.Event(box.tagName === "SELECT" ? "change" : "input"));
  };
  const count = () => page.getElementById("count").textContent;
"""


def scores_of(number):
    """Of base and tuned, every combination; 500 rows of each."""
    return [number % 2, number // 2 % 2, 1, 0]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "eval.html"
    rows = [
        AnswerRow(
            f"问题 {number}？",
            f"《港口法典》第{number}条",
            [f"answer of {model} to {number} {'word ' * 30}" for model in MODELS],
            scores_of(number),
        )
        for number in range(NUM_ROWS)
    ]
    attacked = [AnswerRow(ATTACK, ATTACK, [ATTACK] * 4, [0.25, 0.5, 1, 0])]
    tasks = [TaskAnswers("law", "exact", rows), TaskAnswers("style", "unrepeated", attacked)]
    write_eval_page(
        make_page(title="the evaluation", models=MODELS, summary=[], figures=[], tasks=tasks), path
    )
    return path


def test_the_wrong_ones_come_first_and_of_them_those_that_were_lost(browser, path, tmp_path):
    script = f"""{WATCH}
      const first = questions();
      const verdicts = [...cards()[0].querySelectorAll(".said > div")].map((box) =>
        [box.className, box.querySelector("h4").textContent]);
      page.getElementById("more").click();
      return {{ first, verdicts, more: cards().length, count: count() }};"""
    shown = ask_page(browser, path, script, tmp_path)
    lost = [f"问题 {number}？" for number in range(NUM_ROWS) if scores_of(number)[:2] == [1, 0]]
    assert shown["first"] == lost[:50]
    assert shown["verdicts"] == [
        ["", "reference"],
        ["right", "✓ base"],
        ["wrong", "✗ tuned"],
        ["right", "✓ third"],
        ["wrong", "✗ fourth"],
    ]
    assert shown["more"] == 100
    assert shown["count"] == "2,000 of 2,000"


def test_rows_are_found_by_words_of_question_reference_or_answer(browser, path, tmp_path):
    script = f"""{WATCH}
      const found = {{}};
      for (const words of ["第７７条", "BASE to 1999", "港口 to 12 third", "nowhere"]) {{
        choose("search", words);
        found[words] = questions();
      }}
      return found;"""
    found = ask_page(browser, path, script, tmp_path)
    assert found["第７７条"] == ["问题 77？"]
    assert found["BASE to 1999"] == ["问题 1999？"]
    assert "问题 12？" in found["港口 to 12 third"]
    assert all("12" in question for question in found["港口 to 12 third"])
    assert found["nowhere"] == []


def test_rows_are_chosen_by_what_became_of_them(browser, path, tmp_path):
    script = f"""{WATCH}
      const found = {{}};
      for (const kind of ["all", "wrong", "lost", "learnt", "differing"]) {{
        choose("shown", kind);
        found[kind] = count();
      }}
      choose("judged", "2");
      choose("shown", "wrong");
      found.third = count();
      return found;"""
    found = ask_page(browser, path, script, tmp_path)
    assert found == {
        "all": "2,000 of 2,000",
        "wrong": "1,000 of 2,000",
        "lost": "500 of 2,000",
        "learnt": "500 of 2,000",
        "differing": "2,000 of 2,000",
        "third": "0 of 2,000",
    }


def test_scores_between_right_and_wrong_are_told_as_figures(browser, path, tmp_path):
    script = f"""{WATCH}
      choose("task", "1");
      return [...page.querySelectorAll("#list h4")].map((head) => head.textContent);"""
    assert ask_page(browser, path, script, tmp_path) == [
        "reference",
        "base: unrepeated 0.25",
        "tuned: unrepeated 0.50",
        "third: unrepeated 1.00",
        "fourth: unrepeated 0.00",
    ]


def test_no_script_of_an_answer_runs_and_nothing_breaks_the_policy_of_the_page(
    browser, path, tmp_path
):
    page = dump_page(browser, path.as_uri(), tmp_path)
    assert "<title>the evaluation</title>" in page
    script = f"""{WATCH}
      const faults = [];
      view.addEventListener("error", (event) => faults.push(event.message));
      view.addEventListener("securitypolicyviolation", (event) => faults.push(event.blockedURI));
      for (const task of ["1", "0"]) choose("task", task);
      return [faults, page.title, page.querySelectorAll("img").length];"""
    assert ask_page(browser, path, script, tmp_path) == [[], "the evaluation", 0]


def test_nothing_is_written_on_the_console(browser, path, tmp_path):
    assert console_of(browser, path, tmp_path) == []
    broken = tmp_path / "broken.html"
    broken.write_text(path.read_text("utf-8").replace("find();", "lose();"), "utf-8")
    (said,) = console_of(browser, broken, tmp_path)
    assert "Refused" in said or "violates" in said, "another script is not the one that was hashed"


def test_a_phone_never_scrolls_the_page_sideways(browser, path, tmp_path):
    script = "return page.documentElement.scrollWidth;"
    assert ask_page(browser, path, script, tmp_path, width=375) == 375
