"""What a corpus costs by its rows: python -m benchmarks.scaling_rows [--most 1000000]

Measured on rows of random lengths, each number in a process of its own: seconds and memory of
planning a run with packing and without, and bytes on the disk of prepared rows. Each number of rows
is ten times the one before it, so that a line of the table can be carried on by its last factor.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.memory import peak_above_now
from yrunner.data.batching.plan import make_plan
from yrunner.data.conversation import TokenizedParts
from yrunner.data.dataset.examples import ExampleWriter, Traits
from yrunner.errors import Origin

SMALLEST = 10_000
MEAN_TOKENS = 200
STORED_ROWS = 10_000
"""Rows that are written to measure bytes per row: the format has no part that grows otherwise."""


def main() -> None:
    """Print a table, or measure one line of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=10**6)
    parser.add_argument("--plan", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--packing", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        print(json.dumps(measure_plan(options.plan, packing=options.packing)))
        return
    print(f"prepared rows of {MEAN_TOKENS} tokens: {stored_bytes():.0f} bytes per row on disk")
    print(f"{'rows':>11}  packing  seconds  MB")
    rows = SMALLEST
    while rows <= options.most:
        for packing in (False, True):
            command = [sys.executable, "-m", "benchmarks.scaling_rows", "--plan", str(rows)]
            command += ["--packing"] * packing
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            word = "yes" if packing else "no"
            figures = f"{found['seconds']:7.2f}  {found['megabytes']:.0f}"
            print(f"{rows:11,}  {word:7}  {figures}", flush=True)
        rows *= 10


def measure_plan(rows: int, *, packing: bool) -> dict[str, float]:
    """Seconds and megabytes of planning an epoch, and of walking through its first updates."""
    chance = np.random.default_rng(0)
    lengths_E = np.minimum(chance.geometric(1 / MEAN_TOKENS, rows) + 1, 2048)
    start = time.perf_counter()
    with peak_above_now() as peak:
        plan = make_plan(
            np.maximum(1, lengths_E // 2),
            token_batch=0,
            batch_size=4,
            accumulation=4,
            epochs=1,
            max_updates=None,
            order="shuffle",
            seed=0,
            lengths=lengths_E,
            pack_to=2048 if packing else None,
        )
        next(iter(plan))
    return {"seconds": time.perf_counter() - start, "megabytes": peak[0] / 1e6}


def stored_bytes() -> float:
    """Bytes on the disk of a prepared row of so many tokens."""
    half = [7] * (MEAN_TOKENS // 2)
    example = TokenizedParts([half, half], Origin(Path("rows.jsonl"), 1))
    traits = Traits(content=1, prompt=1, oddities=0)
    with TemporaryDirectory() as name:
        writer = ExampleWriter(Path(name), vocabulary_size=151_936)
        writer.add([example] * STORED_ROWS, [traits] * STORED_ROWS)
        writer.finish()
        return sum(file.stat().st_size for file in Path(name).iterdir()) / STORED_ROWS


if __name__ == "__main__":
    main()
