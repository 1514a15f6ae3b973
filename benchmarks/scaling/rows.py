"""What does each row of a corpus cost? python -m benchmarks.scaling.rows [--most 1000000]

Measures time and memory of planning a run with and without packing, on rows of random lengths, and
the bytes of prepared rows on disk. Each number of rows is ten times the previous one and runs in a
separate process; larger corpora can be extrapolated by the last factor.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.peak_memory import peak_above_now
from yrunner.data.batching.plan import make_plan
from yrunner.data.conversation import TokenizedParts
from yrunner.data.dataset.examples import ExampleWriter, Traits
from yrunner.errors import Origin

SMALLEST = 10_000
MEAN_TOKENS = 200
STORED_ROWS = 10_000
"""Rows written to measure bytes per row; the size of the format is linear in the rows."""


def main() -> None:
    """Print a table; with --plan, measure one line in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--most", type=int, default=10**6, help="largest number of rows")
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
            command = [sys.executable, "-m", "benchmarks.scaling.rows", "--plan", str(rows)]
            command += ["--packing"] * packing
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            word = "yes" if packing else "no"
            figures = f"{found['seconds']:7.2f}  {found['megabytes']:.0f}"
            print(f"{rows:11,}  {word:7}  {figures}", flush=True)
        rows *= 10


def measure_plan(rows: int, *, packing: bool) -> dict[str, float]:
    """Measure seconds and megabytes of planning an epoch and of reading its first update."""
    generator = np.random.default_rng(0)
    lengths_E = np.minimum(generator.geometric(1 / MEAN_TOKENS, rows) + 1, 2048)
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
    """Measure the bytes of a prepared row on disk."""
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
