"""A report is one harmless file: it holds what it was given and asks the network for nothing."""

import re
from html.parser import HTMLParser

import pytest

from yrunner.reports.html import (
    Answer,
    Answers,
    Code,
    KeyFigures,
    Plot,
    Report,
    Table,
    Text,
    render_report,
    write_report,
)
from yrunner.reports.plots import loss_curves, zones_over_time

ATTACK = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"
RECORDS = [
    {
        "step": step,
        "loss": 3 / step,
        "zone_easy": 0.5,
        "zone_learning": 0.3,
        "zone_hard": 0.2,
        "zone_refused": 0.0,
    }
    for step in range(1, 100)
]


class Page(HTMLParser):
    """The tags, attributes and texts of a page, as a browser would read them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def full_report() -> Report:
    plots = (Plot("Loss", loss_curves(RECORDS)), Plot("Zones", zones_over_time(RECORDS), ATTACK))
    answers = (
        Answer("问：第一条？", "九年", "不知道", "九年", False, True),
        Answer(ATTACK, ATTACK, ATTACK, ATTACK, True, False),
        Answer("empty", "x", "", "", None, None),
    )
    return Report(
        f"run {ATTACK}",
        (
            KeyFigures([("legal", "91 %", "before 4 %"), (ATTACK, 1234, ATTACK)]),
            Text(f"First.\n\nSecond {ATTACK}", title="About"),
            *plots,
            Table("Data", ["file", "rows"], [[ATTACK, 1520], ["港口法.jsonl", None]], ATTACK),
            Answers(f"Answers {ATTACK}", answers),
        ),
        subtitle=ATTACK,
    )


@pytest.fixture(scope="module")
def html():
    return render_report(full_report())


def test_every_given_text_is_shown_and_stays_text(html):
    page = Page(html)
    assert page.text.count(ATTACK) == 14
    for shown in ("91 %", "1,234", "1,520", "Second", "港口法.jsonl", "问：第一条？", "九年"):
        assert shown in page.text
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_the_page_asks_for_nothing_outside_itself(html):
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed", "img"} & set(page.tags)
    references = [
        value
        for name, value in page.attributes
        if name in ("src", "href", "xlink:href", "srcset", "action", "data")
    ]
    assert all(value.startswith("#") for value in references)
    markup = html.replace("&lt;img src=x", "")
    assert "@import" not in markup
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", markup))
    addresses = re.findall(r"https?://[^\s\"'<]*", markup)
    assert all(address.startswith("http://www.w3.org/") for address in addresses)
    assert "default-src 'none'" in html


def test_inner_references_of_the_pictures_are_all_there_and_unique(html):
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    used = {value[1:] for name, value in page.attributes if name == "xlink:href"}
    used |= set(re.findall(r"url\(#([^)]*)\)", html))
    assert used <= set(page.ids)


def test_control_characters_and_lone_surrogates_are_made_visible(tmp_path):
    write_report(Report("r", [Text("a\x00b \x1b[31m \ud800")]), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert r"a\x00b \x1b[31m \ud800" in page
    assert "\x00" not in page


def test_columns_of_numbers_are_aligned_right_and_others_left():
    rows = [["a", 1, "91 %"], ["b", 2.5, "–"]]
    page = render_report(Report("r", [Table("t", ["name", "n", "share"], rows)]))
    assert page.count('<td class="number">') == 4
    assert "<td>a</td>" in page


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        (False, True, "learnt"),
        (True, False, "lost"),
        (True, True, "kept"),
        (False, False, "still wrong"),
        (None, True, "right"),
        (None, False, "wrong"),
        (None, None, ""),
        (True, None, ""),
    ],
)
def test_an_answer_says_what_training_did_to_it(before, after, word):
    assert Answer("q", "r", "b", "a", before, after).outcome == word


def test_outcomes_are_counted_above_the_answers():
    judged = [(False, True), (False, True), (True, False), (None, None)]
    rows = [Answer("q", "r", "b", "a", before, after) for before, after in judged]
    assert Answers("t", rows).outcomes == [("learnt", 2), ("lost", 1)]


def test_only_the_first_answers_lie_open():
    rows = [Answer(f"q{index}", "r", "b", "a") for index in range(9)]
    page = render_report(Report("r", [Answers("t", rows, num_open=2)]))
    assert page.count("<details open>") == 2
    assert page.count("<details") == 9


def test_a_report_without_blocks_or_with_empty_ones_is_written(tmp_path):
    empty = [Text(""), KeyFigures([]), Table("t", [], []), Table("u", ["a"], []), Answers("v", [])]
    for blocks in ([], empty):
        write_report(Report("nothing", blocks), tmp_path / "report.html")
        assert "nothing" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_failed_write_keeps_the_old_report_and_leaves_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_report(Report("old", []), path)

    def refuse(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("yrunner.storage.run_dir.os.replace", refuse)
    with pytest.raises(OSError, match="no space"):
        write_report(Report("new", []), path)
    assert "old" in path.read_text(encoding="utf-8")
    assert [found.name for found in tmp_path.iterdir()] == ["report.html"]


def test_the_same_report_gives_the_same_bytes(html):
    assert render_report(full_report()) == html


def test_code_is_shown_as_it_stands_and_escaped():
    page = render_report(Report("r", [Code("Recipe", "a:\n  b: <script>\n")]))
    assert "<pre>a:\n  b: &lt;script&gt;\n</pre>" in page
