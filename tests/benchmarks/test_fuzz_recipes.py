"""A slice of the fuzz finds no traceback, and the fuzz would report one."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults.child import Ending
from benchmarks.fuzz_recipes import QUICK, fault_of, write_case

ROOT = Path(__file__).parents[2]


def test_no_recipe_of_a_slice_ends_a_command_in_a_traceback(forks):
    only = [part for name in QUICK for part in ("--only", name)]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.fuzz_recipes",
            "--recipes",
            "20",
            "--seed",
            "1000",
            *only,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert "60 commands on 20 recipes: exit code 0" in result.stdout


@pytest.mark.parametrize(
    ("code", "output", "what"),
    [
        (0, "", None),
        (2, "recipe.yaml: no such file\n", None),
        (3, "needs deepspeed\n", None),
        (1, "this is a bug\n", "exit code 1"),
        (-11, "", "exit code -11"),
        (None, "", "did not end"),
        (2, "Traceback (most recent call last):\n", "a traceback"),
        (2, "", "no message"),
    ],
)
def test_what_no_command_should_do_is_a_finding(code, output, what):
    assert fault_of(Ending(code, output, 1.0, 1)) == what


def test_a_seed_writes_the_same_case_again(tmp_path):
    written = []
    for number in range(2):
        folder = tmp_path / str(number) / "case"
        (folder / "tiny").mkdir(parents=True)
        for name in ("tiny", "adapter", "mixture"):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "config.json").write_text('{"hidden_size": 16}')
        name = write_case(random.Random(11), folder)
        written.append((name, (folder / name).read_bytes()))
    assert written[0] == written[1]
