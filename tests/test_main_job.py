"""The main job as a new user runs it: the shipped recipes on the toy world, with their bars.

The tiny base is trained once per test run; this is by far the longest test.
"""

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.yrun_process import forking

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which `yrun train recipes/legal_sft.yaml` ran, and what it printed."""
    folder = tmp_path_factory.mktemp("main_job")
    command = [sys.executable, "-m", "yrunner.cli", "train", str(RECIPES / "legal_sft.yaml")]
    with forking():
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder / "outputs", result.stdout


def right(outputs: Path, name: str, when: str, task: str) -> float:
    rows = json.loads((outputs / name / f"{when}.json").read_text("utf-8"))["answers"][task]
    return sum(row["right"] for row in rows) / len(rows)


def test_the_base_answers_at_least_90_percent_of_the_general_test(run):
    # 95.6 % of 180 questions, give or take 1.5: the bar lies 3.7 standard deviations below.
    assert right(run[0], "tiny-base", "after", "general") >= 0.9


def test_the_tuned_model_answers_70_percent_of_the_legal_test_from_under_5(run):
    assert right(run[0], "legal-sft", "before", "legal") < 0.05
    # Three seeds give 85.6 %, and seeds and rounding move it by up to 5 points: the bar lies three
    # of these below. Where rounding locked half of the book out, it was 43 %.
    assert right(run[0], "legal-sft", "after", "legal") >= 0.7


def test_the_figures_are_printed_by_the_run_itself(run):
    outputs, printed = run
    after = right(outputs, "legal-sft", "after", "legal")
    assert re.search(rf"legal +domain +\d+ +exact +\d\.\d% +{after:.1%}", printed)
    assert "yrun merge" in printed


def test_every_row_is_learned_and_every_target_once_per_epoch(run):
    for name in ("tiny-base", "legal-sft"):
        folder = run[0] / name
        files = json.loads((folder / "data_report.json").read_text("utf-8"))["files"]
        assert all(file["rows"] == file["kept"] for file in files)
        learned = defaultdict(int)
        for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines():
            record = json.loads(line)
            if "loss" in record:
                learned["targets"] += record["targets"]
                learned["epochs"] = round(record["epoch"])
        targets = sum(file["targets"] for file in files if file["purpose"] == "train")
        assert learned["targets"] == learned["epochs"] * targets


def test_nlirg_saw_all_kinds_of_tokens(run):
    lines = (run[0] / "legal-sft" / "metrics.jsonl").read_text("utf-8").splitlines()
    first = json.loads(lines[0])
    assert first["zone_learning"] > 0
    assert first["weighted_loss"] < first["loss"]
