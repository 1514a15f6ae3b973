"""A real browser opens a report from disk: the content shows, and no script of an answer runs."""

import pytest

from tests.reports.conftest import ask_page, dump_page
from yrunner.reports.html import Answer, Answers, KeyFigures, Plot, Report, Table, write_report
from yrunner.reports.plots import loss_curves

ATTACK = (
    "</div><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
)


@pytest.fixture(scope="module")
def report_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    wide = Plot("Loss", loss_curves([{"step": step, "loss": 1 / step} for step in range(1, 9)]))
    answers = [Answer("问题？", "九年", ATTACK, "word" * 200, False, True)]
    figures = KeyFigures([("legal answers", "91 %", "before 4 %")])
    table = Table("Wide", [f"a long name of column {index}" for index in range(9)], [[1] * 9])
    blocks = [figures, wide, table, Answers("Answers", answers)]
    write_report(Report("the report", blocks), path)
    return path


def test_a_browser_shows_the_report_and_runs_no_script_of_an_answer(browser, report_path, tmp_path):
    page = dump_page(browser, report_path.as_uri(), tmp_path)
    assert "<title>the report</title>" in page
    assert "&lt;script&gt;document.title='owned'&lt;/script&gt;" in page
    for shown in ("91 %", "问题？", "optimizer step"):
        assert shown in page


def test_a_phone_never_scrolls_the_page_sideways(browser, report_path, tmp_path):
    script = "return page.documentElement.scrollWidth;"
    assert ask_page(browser, report_path, script, tmp_path, width=375) == 375
