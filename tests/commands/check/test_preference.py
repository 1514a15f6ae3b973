"""`yrun check` says what is learned from better and worse answers, and what became of each."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_jsonl
from tests.project import DPO, pairs
from yrunner.assembly.run import Run
from yrunner.commands.check.command import check
from yrunner.data.conversation import RatedExample, TokenizedPair
from yrunner.errors import DataError, YRunnerError

KTO = "loss={kind: kto}"


def checked(capfd: pytest.CaptureFixture[str], *overrides: str, as_machine: bool = False) -> str:
    capfd.readouterr()
    check(DPO, list(overrides), as_machine=as_machine, sample=0)
    return capfd.readouterr().out


def facts_of(capfd: pytest.CaptureFixture[str], *overrides: str) -> dict[str, Any]:
    return dict(json.loads(checked(capfd, *overrides, as_machine=True)))


def test_check_counts_pairs_and_says_what_length_alone_would_predict(
    preference: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    facts = facts_of(capfd)
    assert facts["data"]["examples"] == 16
    assert facts["steps"]["updates_per_epoch"] == 4, "the batch size is 4 pairs"
    answers = facts["data"]["answers"]
    assert answers == facts["rows"]["answers"]["train"]
    assert answers["better"]["answers"] == answers["worse"]["answers"] == 16
    assert answers["better"]["targets"] + answers["worse"]["targets"] == facts["data"]["targets"]
    assert answers["longer_wins"] + answers["equally_long"] <= 1
    shown = checked(capfd)
    assert "longer wins: " in shown
    assert re.search(r"updates: 8 in total, 4 per epoch, 4 pairs each", shown)
    assert re.search(r"chosen +16 ", shown)
    assert "different prompts: 16" in shown


def test_check_counts_marked_answers(preference: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = checked(capfd, KTO)
    assert re.search(r"good +16 .*\n.*bad +16 ", shown)
    assert "longer wins" not in shown
    assert "8 per epoch, 4 answers each" in shown


def test_check_shows_the_fate_of_every_pair_with_both_rows(
    preference: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = pairs(16)
    flipped = rows[2] | {"chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"]}
    write_jsonl(preference / "pairs.jsonl", [*rows, flipped, rows[0] | {"rejected": ""}, rows[5]])
    shown = " ".join(checked(capfd, "data.invalid=drop").split())
    assert 'empty 1 pairs.jsonl row 18: "rejected" is empty' in shown
    assert "keep one of the two 2 pairs.jsonl row 3 and pairs.jsonl row 17" in shown
    assert "repeated pairs in train 1 pairs.jsonl row 19 and pairs.jsonl row 6" in shown
    with pytest.raises(YRunnerError, match=r'pairs\.jsonl row 18: "rejected" is empty'):
        Run.load(DPO).accept_rows()


def test_a_file_of_single_answers_is_refused_with_a_remedy(preference: Path) -> None:
    override = ["data.train=[{file: train.jsonl}]"]
    with pytest.raises(DataError) as refused:
        check(DPO, override, as_machine=True, sample=0)
    assert "train.jsonl row 1: has no better and worse answers" in str(refused.value)
    assert "or set train.stage to sft for single answers" in str(refused.value)


def test_the_pairs_of_a_run_are_pairs_or_rated_answers(preference: Path) -> None:
    run = Run.load(DPO, ["data.validation=[]", "data.validation_share=0.25"])
    run.refuse_faulty_rows()
    assert (len(run.pairs.train), len(run.pairs.validation)) == (12, 4)
    assert all(isinstance(pair, TokenizedPair) for pair in run.pairs.train)
    rated = Run.load(DPO, [KTO])
    assert all(isinstance(answer, RatedExample) for answer in rated.pairs.train)
    assert len(rated.pairs.train) == 32
