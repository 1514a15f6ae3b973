"""A small fault campaign loses nothing, and would notice a loss."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.cases import unexplained
from benchmarks.faults.child import Ending
from benchmarks.faults.stages import differences, half_written

ROOT = Path(__file__).parents[2]
NUM_CASES = 4


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The recorded cases of the campaign."""
    record = tmp_path_factory.mktemp("campaign") / "cases.jsonl"
    arguments = ["--cases", str(NUM_CASES), "--seed", "5", "--record", str(record)]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert record.exists(), result.stdout + result.stderr
    found = [json.loads(line) for line in record.read_text("utf-8").splitlines()]
    assert (result.returncode == 1) == any(case["lost"] for case in found)
    return found


def lost(cases: list[dict[str, Any]], campaign: str) -> list[dict[str, Any]]:
    """The cases of a campaign in which something was lost; fails without any case."""
    tried = Counter(case["campaign"] for case in cases)
    if campaign in ("disk full", "read-only", "no permission") and not tried[campaign]:
        pytest.skip("this user cannot mount a file system")
    assert tried[campaign] >= (NUM_CASES if campaign == "killed" else 1)
    return [case for case in cases if case["campaign"] == campaign and case["lost"]]


def test_a_killed_command_recovers_bit_for_bit(cases):
    assert lost(cases, "killed") == []


def test_a_full_disk_gives_a_message_and_with_more_space_the_command_recovers(cases):
    assert lost(cases, "disk full") == []


def test_a_read_only_disk_gives_a_message_and_changes_nothing(cases):
    assert lost(cases, "read-only") == []


def test_a_missing_permission_gives_a_message(cases):
    assert lost(cases, "no permission") == []


def test_a_file_that_changes_during_reading_is_named_or_has_no_effect(cases):
    assert lost(cases, "changing file") == []


def test_corrupt_recipes_and_rows_are_rejected_by_line_and_row(cases):
    assert lost(cases, "corrupt recipe") == []
    assert lost(cases, "corrupt rows") == []
    assert lost(cases, "corrupt pairs") == []


def test_a_half_written_file_is_noticed_unless_its_name_marks_it_as_partial(tmp_path: Path):
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


def test_a_different_or_missing_result_is_noticed():
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
def test_a_failure_without_a_message_is_a_loss(code: int, output: str, is_wrong: bool):
    assert bool(unexplained(Ending(code, output, 1.0, 10))) == is_wrong
