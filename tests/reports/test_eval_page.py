"""The evaluation page as text."""

import json
import re

import pytest

from tests.reports.conftest import ATTACK
from yrunner.reports.eval_page import (
    AnswerRow,
    Confusion,
    EvalPage,
    FigureRow,
    Reached,
    TaskAnswers,
    render_eval_page,
    write_eval_page,
)


def make_page(**changes):
    settings = {
        "title": f"law {ATTACK}",
        "subtitle": "greedy",
        "models": ["base", "tuned"],
        "judged": 1,
        "summary": [FigureRow("all tasks", "domain", [Reached("1.0%"), None])],
        "figures": [
            FigureRow(
                "law", "exact", [Reached("4.0%"), Reached("91.0%", "+87.0 [80, 94]", "better")]
            ),
            FigureRow("law", "f1", [Reached("50.0%"), Reached("51.0%", "+1.0 [-2, 4]")]),
        ],
        "confusions": [
            Confusion("Labels: law", ["a", "b"], ["a", "b", "none"], [[3, 1, 0], [0, 0, 0]])
        ],
        "tasks": [TaskAnswers("law", "exact", [AnswerRow("问题？", "九年", [ATTACK, ""], [0, 1])])],
        "notes": ["what the colours mean"],
    }
    return EvalPage(**{**settings, **changes})


def test_figures_stand_beside_their_changes_in_the_colour_of_the_verdict():
    page = render_eval_page(make_page())
    cells = re.findall(
        r'<td class="number ?(\w*)\s*">([^<]*)(?:<span class="change">([^<]*))?', page
    )
    stripped = [(verdict, value.strip(), change) for verdict, value, change in cells]
    assert ("better", "91.0%", "+87.0 [80, 94]") in stripped
    assert ("", "51.0%", "+1.0 [-2, 4]") in stripped
    assert ("", "–", "") in stripped
    assert "what the colours mean" in page


def test_a_group_is_named_once():
    page = render_eval_page(make_page())
    assert re.findall(r'<td class="group">([^<]*)', page) == ["all tasks", "law", ""]


def test_the_matrix_is_coloured_by_the_share_of_its_row():
    page = render_eval_page(make_page())
    assert re.findall(r"--share: ([\d.]+)\">(\d)", page) == [
        ("0.750", "3"),
        ("0.250", "1"),
        ("0.000", "0"),
        ("0.000", "0"),
        ("0.000", "0"),
        ("0.000", "0"),
    ]


def test_the_script_gets_every_answer_and_no_answer_becomes_markup():
    page = render_eval_page(make_page())
    assert ATTACK not in page
    content = re.search(r'id="answers">(.*?)</script>', page, re.DOTALL)[1]
    (task,) = json.loads(content)["tasks"]
    assert task == {
        "name": "law",
        "score": "exact",
        "graded": True,
        "rows": [["问题？", "九年", [ATTACK, ""], [0, 1]]],
    }


@pytest.mark.parametrize(
    ("scores", "graded"), [([0, 1.0], True), ([0.5, 1], False), ([None, 1], False)]
)
def test_right_and_wrong_are_said_where_there_is_nothing_else(scores, graded):
    assert TaskAnswers("t", "s", [AnswerRow("q", "r", ["a", "b"], scores)]).is_graded is graded


def test_a_page_without_answers_needs_no_script(tmp_path):
    write_eval_page(make_page(tasks=[]), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "<script" not in page
    assert "Answers" not in page
