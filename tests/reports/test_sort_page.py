"""The page of a sorted corpus is one harmless file that holds the figures of every row."""

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.reports.conftest import ATTACK, scores_of
from tests.reports.test_html import Page
from yrunner.reports.sort_page import (
    PATTERNS,
    SideBySide,
    SortedRow,
    SortPage,
    TokensOfExample,
    pack_tokens,
    render_sort_page,
    write_sort_page,
)
from yrunner.reports.token_text import TokenText
from yrunner.scoring.suspicious_spans import find_spans


@pytest.fixture(scope="module")
def example(tokenize):
    return tokenize("user Capital?", f"根据《港口法典》， Belo is {ATTACK}\u202e\r\n<|im_end|>")


@pytest.fixture(scope="module")
def packed(example, capitals_tokenizer):
    return pack_tokens(
        [TokensOfExample(example, scores_of(example, 9))], TokenText(capitals_tokenizer)
    )


@pytest.fixture(scope="module")
def sort_page(packed):
    rows = [
        SortedRow(
            file="chat.jsonl",
            number=number + 1,
            text=f"Question {number} → answer {ATTACK if number == 3 else number}",
            scores={"excess": number / 7, "similarity": 1 - number / 20},
            mean_loss=number / 5,
            mean_entropy=1 / (number + 1),
            num_targets=number,
            dropped=f"excess is above {ATTACK}" if number > 17 else None,
            heat_map=packed if number > 10 else None,
            content=f"{number:016x}",
            mark="keep" if number == 4 else None,
        )
        for number in range(20)
    ]
    texts = (f"The fine is 5 coins {ATTACK}", f"The fine is 50 coins {ATTACK}")
    return SortPage(
        title=f"chat {ATTACK}",
        score="excess",
        rows=rows,
        pairs=[SideBySide("conflict", (2, 5), texts, 0.9)],
        num_pairs={"conflict": 7, "near": 0},
        findings=[(f"odd {ATTACK}", 2, "chat.jsonl:4")],
    )


@pytest.fixture(scope="module")
def page(sort_page):
    return render_sort_page(sort_page)


def content_of(page: str, name: str) -> str:
    (text,) = re.findall(
        rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL
    )
    return text


def test_every_row_has_its_figures_on_the_page(page, sort_page):
    content = json.loads(content_of(page, "rows"))
    assert content["number"] == [row.number for row in sort_page.rows]
    assert content["text"][3] == sort_page.rows[3].text
    assert content["scores"]["excess"] == pytest.approx(
        [row.scores["excess"] for row in sort_page.rows], rel=1e-3
    )
    assert content["loss"] == pytest.approx([row.mean_loss for row in sort_page.rows], rel=1e-3)
    assert content["low"] == ["similarity"]
    assert set(content["dropped"]) == {"18", "19"}
    assert content["pairs"][0]["rows"] == [2, 5]


def test_a_packed_row_tells_every_target_of_its_example(packed, example):
    scores = scores_of(example, 9)
    content = json.loads(packed)
    num_targets = len(example.target_positions)
    kinds = [int(kind, 20) for kind in content["kinds"]]
    assert len(kinds) == len(content["texts"])
    assert sum(kind % 10 for kind in kinds) == num_targets
    assert content["loss"] == [round(100 * loss) for loss in scores.loss_N.double().tolist()]
    assert len(content["entropy"]) == num_targets
    shown = "".join(content["texts"])
    assert "user Capital?" in shown
    assert "根据《港口法典》" in shown
    assert "\u202e" not in shown
    wrong = [n for n in range(num_targets) if n % 3]
    assert [int(place) for place in content["top"]] == wrong
    for span in find_spans(scores.loss_N, scores.entropy_N):
        for sign in content["patterns"][span.start : span.end]:
            assert PATTERNS[int(sign)] == span.pattern
    assert len(content["patterns"]) == num_targets


def test_each_line_of_the_heat_maps_is_that_of_its_row(page, sort_page, packed):
    lines = content_of(page, "maps").split("\n")
    assert len(lines) == len(sort_page.rows)
    for line, row in zip(lines, sort_page.rows, strict=True):
        assert (json.loads(line) if line else None) == (
            json.loads(packed) if row.heat_map else None
        )


def test_the_page_asks_for_nothing_and_text_of_the_data_stays_text(page):
    parsed = Page(page)
    assert not {"link", "iframe", "object", "embed", "img"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name in ("src", "href", "srcset")]
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "url(" not in page
    assert not {"\x1b", "\u202e"} & set(page)
    *_, script = re.findall("<script.*?>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'\"" in page
    assert len(parsed.ids) == len(set(parsed.ids))
    assert f"chat {ATTACK}" in "".join(parsed.texts)


def test_pairs_that_are_not_shown_are_counted(page):
    text = re.sub(r"\s+", " ", Page(page).text)
    assert "7 pairs:" in text
    assert ", 1 shown below" in text


def test_a_score_that_is_no_number_and_an_empty_corpus_make_a_page(sort_page, tmp_path: Path):
    row = replace(sort_page.rows[0], scores={"excess": math.nan}, mean_loss=math.inf)
    odd = replace(sort_page, rows=[row], pairs=[])
    content = json.loads(content_of(render_sort_page(odd), "rows"))
    assert content["scores"]["excess"] == [None]
    assert content["loss"] == [None]
    write_sort_page(replace(sort_page, rows=[], pairs=[]), tmp_path / "page.html")
    assert "0 rows" in (tmp_path / "page.html").read_text("utf-8")
