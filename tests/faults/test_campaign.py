"""A small fault campaign, for real: nothing is lost; and a loss would be seen."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fault_campaign.cases import unexplained
from benchmarks.fault_campaign.child import Ending
from benchmarks.fault_campaign.stages import differences, half_written

ROOT = Path(__file__).parents[2]
NUM_CASES = 4


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every case of the campaign, as it records them."""
    record = tmp_path_factory.mktemp("campaign") / "cases.jsonl"
    arguments = ["--cases", str(NUM_CASES), "--seed", "5", "--record", str(record)]
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks/faults.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert record.exists(), result.stdout + result.stderr
    found = [json.loads(line) for line in record.read_text("utf-8").splitlines()]
    assert (result.returncode == 1) == any(case["lost"] for case in found)
    return found


def lost(cases: list[dict[str, Any]], campaign: str) -> list[dict[str, Any]]:
    """The cases in which something was lost; there has to be a case at all."""
    tried = Counter(case["campaign"] for case in cases)
    if campaign in ("disk full", "read-only", "no permission") and not tried[campaign]:
        pytest.skip("this user cannot mount a file system")
    assert tried[campaign] >= (NUM_CASES if campaign == "killed" else 1)
    return [case for case in cases if case["campaign"] == campaign and case["lost"]]


def test_a_killed_command_ends_bit_for_bit_as_if_it_had_never_been_killed(cases):
    assert lost(cases, "killed") == []


def test_a_full_disk_is_a_sentence_and_with_more_space_it_goes_on(cases):
    assert lost(cases, "disk full") == []


def test_a_read_only_disk_is_a_sentence_and_nothing_has_changed(cases):
    assert lost(cases, "read-only") == []


def test_a_missing_permission_is_a_sentence(cases):
    assert lost(cases, "no permission") == []


def test_a_file_that_changes_while_it_is_read_is_named_or_has_no_effect(cases):
    assert lost(cases, "changing file") == []


def test_spoilt_recipes_and_rows_are_refused_by_their_place(cases):
    assert lost(cases, "spoilt recipe") == []
    assert lost(cases, "spoilt rows") == []


def test_a_half_written_file_is_seen_unless_its_name_says_that_it_is_not_finished(tmp_path: Path):
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    for name, content in {
        "whole.json": "{}",
        "half.json": '{"a":',
        "half.jsonl": '{"a": 1}\n{"a"',
        "half.html": "<html><body>",
        "half.safetensors": "x",
        ".half.json.partial": "{",
    }.items():
        (outputs / name).write_text(content)
    names = [Path(path).name for path in half_written(tmp_path)]
    assert names == ["half.html", "half.json", "half.jsonl", "half.safetensors"]


def test_a_result_that_differs_or_is_missing_is_seen():
    assert differences({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "x", "d": "4"}) == [
        *("b", "c", "d"),
    ]


@pytest.mark.parametrize(
    ("code", "output", "is_wrong"),
    [
        (0, "", False),
        (2, "the disk is full. Free some space\n", False),
        (2, "", True),
        (1, "this is a bug in yrunner\n", True),
        (2, "Traceback (most recent call last):\n", True),
    ],
)
def test_a_failure_without_a_sentence_is_a_loss(code: int, output: str, is_wrong: bool):
    assert bool(unexplained(Ending(code, output, 1.0, 10))) == is_wrong
