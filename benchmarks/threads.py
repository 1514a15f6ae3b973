"""How fast do trainings go that share the cores? python -m benchmarks.threads

Trains the toy world's base alone, and then several times at once: each with as many threads as
there are cores, which is torch's choice, and with the number that yrunner chooses. Prints the
targets per second of each training.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from benchmarks.markdown import print_markdown
from benchmarks.paths import RECIPES, ROOT
from yrunner.machine import SETTINGS

OVERRIDES = ("eval.tasks=[]", "train.log_every=1", "train.lr_scheduler=constant")
WARM_UP = 10
"""Updates that are not counted: in these the trainings start, and look around."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--together", type=int, default=2)
    parser.add_argument("--recipe", type=Path, default=RECIPES / "tiny_base.yaml")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    settings: dict[str, dict[str, str]] = {
        f"{cores} threads": {"OMP_NUM_THREADS": str(cores)},
        "passive": {"OMP_NUM_THREADS": str(cores), "OMP_WAIT_POLICY": "passive"},
        "yrunner": {},
    }
    rows = []
    for name, setting in settings.items():
        rates = [
            mean(train(options.recipe, number, options.updates, setting))
            for number in (1, options.together)
        ]
        ratio = rates[0] / rates[1]
        rows.append((name, *rates, ratio))
    columns = ("threads", "alone", f"each of {options.together}", "times as long as alone")
    print_markdown(f"Targets per second, {options.recipe.name}", columns, rows)


def train(recipe: Path, number: int, updates: int, setting: dict[str, str]) -> list[float]:
    """Targets per second of each of `number` trainings at once."""
    environment = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        command = (sys.executable, "-c", "from yrunner.cli import main; main()", "train", recipe)
        overrides = (*OVERRIDES, f"train.max_steps={updates}")
        trainings = [
            subprocess.Popen(
                [*command, *overrides, f"output={folder}/{index}"],
                cwd=ROOT,
                env=environment | setting,
                stdout=subprocess.DEVNULL,
            )
            for index in range(number)
        ]
        for training in trainings:
            if training.wait():
                raise SystemExit(training.returncode)
        logs = [Path(folder, str(index), "metrics.jsonl") for index in range(number)]
        return [rate_of(log) for log in logs]


def rate_of(log: Path) -> float:
    """Targets per second behind the warm-up."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    counted = [record for record in records if "targets_per_second" in record][WARM_UP:]
    seconds = sum(record["targets"] / record["targets_per_second"] for record in counted)
    return sum(record["targets"] for record in counted) / seconds


if __name__ == "__main__":
    main()
