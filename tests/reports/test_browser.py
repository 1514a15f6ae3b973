"""A real browser opens a report from disk: the content shows, and no script of an answer runs."""

import os
import shutil
import subprocess

import pytest

from yrunner.reports.html import Answer, Answers, Figures, Plot, Report, Table, write_report
from yrunner.reports.plots import loss_curves

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ATTACK = (
    "</div><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
)


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip(f"no browser found: install one of {', '.join(BROWSERS)}")
    return found


def dump_page(browser, address, user_folder):
    """The page after the browser has read it and run what it would run."""
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--dump-dom", "--hide-scrollbars", "--virtual-time-budget=5000"),
        *(f"--user-data-dir={user_folder}", "--allow-file-access-from-files"),
    ]
    environment = {**os.environ, "LANG": "C.UTF-8"}
    finished = subprocess.run(
        [browser, *options, address],
        **{"capture_output": True, "timeout": 120, "check": True, "env": environment},
    )
    return finished.stdout.decode("utf-8")


@pytest.fixture(scope="module")
def report_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    wide = Plot("Loss", loss_curves([{"step": step, "loss": 1 / step} for step in range(1, 9)]))
    answers = [Answer("问题？", "九年", ATTACK, "word" * 200, False, True)]
    figures = Figures([("legal answers", "91 %", "before 4 %")])
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
    frame = report_path.with_name("frame.html")
    frame.write_text(
        f"""<iframe id="phone" width="375" height="800" src="{report_path.name}"></iframe>
        <script>window.onload = () => {{
          document.title = "width " + phone.contentDocument.documentElement.scrollWidth;
        }};</script>""",
        encoding="utf-8",
    )
    assert "<title>width 375</title>" in dump_page(browser, frame.as_uri(), tmp_path)
