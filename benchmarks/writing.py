"""What does it cost to let the base write the rows of `keep` and `drift`, beside the training?

    python -m benchmarks.writing RECIPE [--rows 64] [--drift-rows 16] [--updates 24] [key=value ...]

In one process: the base writes the rows into an empty folder, and then the recipe trains with
them for a few updates, each with its replay rows. The training of the recipe as it stands has as
many updates as its plan says; its time is the median of an update times that number. Time is that
of the processor, so that other programs count less.
"""

import argparse
import statistics
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainerCallback

from yrunner.assembly.keep import add_regulariser
from yrunner.assembly.replay import RegulariserData, prepare_keep
from yrunner.assembly.run import Run
from yrunner.assembly.trainer import (
    mixed_precision,
    run_trainer,
    training_arguments,
    untrained_model,
)
from yrunner.recipe.schema.keep import HeldToRows, SelfReplay

DEFAULT_SHARE = SelfReplay(kind="self_replay").share
WARM_UP = 2
"""Updates that are not counted."""


class Clock(TrainerCallback):
    """Notes the processor time after each update."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.times.append(time.process_time())


def main() -> None:
    """Write, train, and print both times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--drift-rows", type=int, default=16)
    parser.add_argument("--updates", type=int, default=24)
    options = parser.parse_args()
    as_it_stands = Run.load(options.recipe, options.overrides)
    planned, keep = as_it_stands.plan().num_updates, as_it_stands.recipe.keep
    share = keep.share if isinstance(keep, HeldToRows) else DEFAULT_SHARE
    with TemporaryDirectory() as folder:
        overrides = [
            *options.overrides,
            f"output={folder}/run",
            f"keep={{kind: self_replay, rows: {options.rows}, share: {share}, write_minutes: 999}}",
            f"drift.rows={options.drift_rows}",
            f"train.max_steps={options.updates + WARM_UP}",
        ]
        run = Run.load(options.recipe, overrides)
        _ = run.base_key  # unpacks a GGUF file, which other commands need too
        began = time.process_time()
        data = prepare_keep(run)
        writing = time.process_time() - began
        update = seconds_of_an_update(run, data)
    tokens = sum(len(row.input_ids) for row in [*data.rows, *data.drift_rows])
    training = update * planned
    print(
        f"writing {len(data.rows)} rows for keep and {len(data.drift_rows)} for drift "
        f"({tokens:,} tokens, {run.looks_in}): {writing:.1f} s of processor time, loading included"
    )
    print(f"an update in {run.precision.name}: {update:.2f} s; {planned} updates: {training:.0f} s")
    print(f"writing / training: {writing / training:.2f}")


def seconds_of_an_update(run: Run, data: RegulariserData) -> float:
    """Median processor time of an update with replay rows."""
    plan, clock = run.plan(), Clock()
    model = untrained_model(run)
    run.folder.create()
    steps = run.recipe.train.gradient_accumulation_steps
    trainer = run_trainer(run, model, plan, training_arguments(run, plan, steps, None))
    trainer.callbacks.append(clock)
    with mixed_precision(trainer, run.dtype):
        add_regulariser(trainer, run, data)
    trainer.train(None)
    seconds = [after - before for before, after in pairwise(clock.times)]
    return statistics.median(seconds[WARM_UP:])


if __name__ == "__main__":
    main()
