"""`yrun inspect` shows both answers of a pair, and how an answer is marked."""

import re
from pathlib import Path

import pytest

from tests.conftest import write_jsonl
from tests.project import DPO, pairs
from yrunner.commands.inspect.command import inspect

KTO = "loss={kind: kto}"


def inspected(capfd: pytest.CaptureFixture[str], *overrides: str, row: str | None = None) -> str:
    inspect(DPO, list(overrides), number=2, row=row)
    return capfd.readouterr().out


def test_inspect_shows_both_answers_and_the_prompt_once(
    preference: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = inspected(capfd, "train.order=as_written")
    (row, better), (same_row, worse), *_ = re.findall(r"row (\d+) · (\w+) ·", shown)
    assert (row, better, worse) == (same_row, "chosen", "rejected")
    first = pairs(16)[int(row) - 1]
    assert shown.count(first["prompt"]) == 1
    assert f"⟦{first['chosen']}<|im_end|>⟧" in shown
    assert re.search(
        rf"… the same prompt of \d+ tokens\n⟦{re.escape(first['rejected'])}<\|im_end\|>⟧", shown
    )


def test_inspect_shows_marks_of_rated_answers(
    preference: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = inspected(capfd, KTO, row="pairs.jsonl:3")
    assert re.findall(r"row 3 · (\w+) ·", shown) == ["good", "bad"]
    assert shown.count(pairs(3)[2]["prompt"]) == 2, "each is learned alone"


def test_inspect_counts_what_is_cut_from_each_answer(
    preference: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "q", "chosen": "Belo.", "rejected": "no " * 100}]
    write_jsonl(preference / "pairs.jsonl", rows * 4)
    options = ["data.max_length=64", "data.too_long=cut"]
    for row in (None, "pairs.jsonl:1"):
        shown = inspected(capfd, *options, row=row)
        assert "⟦Belo.⟧\n✂ 2 tokens cut off" in shown, "its end mark, and the line end behind it"
        assert re.search(r"✂ \d{3} tokens cut off", shown)


def test_inspect_shows_why_a_pair_is_left_out(
    preference: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(preference / "pairs.jsonl", [*pairs(2), pairs(1)[0] | {"rejected": "no " * 100}])
    shown = inspected(capfd, row="pairs.jsonl:3")
    assert "row 3 · not trained on: the worse answer: has " in shown
    assert re.findall(r"row 3 · (\w+) ·", shown) == ["chosen", "rejected"]
    write_jsonl(preference / "pairs.jsonl", [*pairs(2), pairs(1)[0] | {"rejected": 5}])
    shown = inspected(capfd, row="pairs.jsonl:3")
    assert 'not trained on: "rejected" is a number' in shown
    assert '"rejected": 5' in shown
