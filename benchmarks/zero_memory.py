"""How accurate is the memory estimate for ZeRO? python -m benchmarks.zero_memory

Compares the estimate with two processes that train a small model on the CPU over gloo, in float32.
Measures the peak of the resident memory during an update, less what was resident before the model
was built. Building the model and the first update, which creates the optimizer state, are excluded.
Then writes a checkpoint and measures what rank 0 holds beyond training. Each stage runs in new
processes.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed
from transformers import AutoConfig

from benchmarks.markdown import print_markdown
from benchmarks.memory import TUNINGS, full_batch
from benchmarks.peak_memory import RETURN_FREED_MEMORY, peak_above_now, reset_peak
from benchmarks.processes import run_together
from benchmarks.scaling.trainings import saved_tensors_bytes
from benchmarks.traffic import (
    CONFIG,
    RANKS,
    make_model,
    make_updater,
    make_zero_engine,
    zero_update,
)
from yrunner.distributed.collectives import join_ranks
from yrunner.models.errors import silence_libraries
from yrunner.models.meta import build_fake_model
from yrunner.models.size import count_weights_of
from yrunner.training.deepspeed.state import SHARD_BYTES, ZeroRun
from yrunner.training.memory.trace import StepTrace, trace_step
from yrunner.training.memory.zero import FLOAT32, Sharing, Workload, memory_per_gpu

LARGER = CONFIG | {"hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 8}
"""36 million weights: large, compared with everything else in the process."""
STAGES = (0, 1, 2, 3)
"""0: without DeepSpeed."""
UPDATES = 2
OPTIMIZER = "adamw_torch"


def main() -> None:
    """Print measured and estimated megabytes for every stage."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    os.environ |= RETURN_FREED_MEMORY
    job = estimated_job()
    training, saving = [], []
    for stage in STAGES:
        measured = measured_bytes(stage)
        layout = Sharing(RANKS, stage or None)
        expected = memory_per_gpu(job, layout).peak
        training.append((str(layout), *_compare(measured["training"], expected)))
        if stage:
            moments = _compare(measured["optimizer"], saved_at_once(job))
            weights = _compare(measured["model"], FLOAT32 * job.counts.total)
            saving.append((str(layout), *moments, *weights))
    print(f"{job.counts.total / 1e6:.1f} million weights, all trained")
    columns = ("", "measured", "estimated", "ratio")
    print_markdown(f"MB per process during an update, {RANKS} processes:", columns, training)
    columns = ("", "optimizer", "estimated", "ratio", "model", "estimated", "ratio")
    print_markdown("MB that the first process holds in addition while it saves:", columns, saving)


def _compare(measured: float, estimated: float) -> tuple[float, float, float]:
    return measured / 1e6, estimated / 1e6, estimated / measured


def saved_at_once(job: Workload) -> int:
    """Return the bytes of weights and moments that rank 0 holds while saving.

    See `ZeroRun.save`: one shard, and the weight that is gathered next.
    """
    shard = min(SHARD_BYTES, saved_tensors_bytes(job.counts.total))
    return shard + saved_tensors_bytes(job.counts.largest)


def estimated_job() -> Workload:
    """Trace the same update for the estimate; DeepSpeed steps over all weights at once."""
    model = build_fake_model(AutoConfig.for_model(**LARGER), TUNINGS["full"], dtype=torch.float32)
    counts = count_weights_of(model)
    trace = trace_step(
        model,
        full_batch(1, 32, num_targets=16),
        dtype=torch.float32,
        optimizer=OPTIMIZER,
        foreach=True,
    )
    assert isinstance(trace, StepTrace), trace.reason
    return Workload(trace, counts, bytes_per_number=4, bucket_numbers=LARGER["hidden_size"] ** 2)


def measured_bytes(stage: int) -> dict[str, int]:
    """Measure the peak of rank 0 of two processes during training, and then while it saves."""
    with TemporaryDirectory() as folder:
        # Spawn: in a fork the C library would not read its environment variables again.
        run_together(_train_and_save, stage, Path(folder), number=RANKS, method="spawn")
        return dict(json.loads((Path(folder) / "bytes.json").read_text("ascii")))


def _train_and_save(rank: int, stage: int, folder: Path) -> None:
    # Before memory is measured, because the code of DeepSpeed does not count.
    join_ranks(deepspeed=stage > 0)
    engine: Any = None
    with peak_above_now() as training:
        model = make_model("full", LARGER)
        if stage:
            engine = make_zero_engine(model, stage, 1)
        update = zero_update(engine, 1) if stage else make_updater(model, stage, 1)
        update()
        reset_peak()
        for _ in range(UPDATES):
            update()
    peaks = {"training": training[0]}
    if stage:
        zero = ZeroRun(model, stage, OPTIMIZER)
        zero.engine = engine
        peaks["optimizer"] = _peak_of(lambda: zero.save(folder, UPDATES))
        peaks["model"] = _peak_of(lambda: _save_model(model, zero, folder))
    if rank == 0:
        (folder / "bytes.json").write_text(json.dumps(peaks), "ascii")
    distributed.barrier()


def _peak_of(action: Callable[[], None]) -> int:
    with peak_above_now() as peak:
        reset_peak()
        action()
    return peak[0]


def _save_model(model: Any, zero: ZeroRun, folder: Path) -> None:
    weights = zero.whole_weights()
    if weights:
        with silence_libraries():
            model.save_pretrained(folder, state_dict=weights)


if __name__ == "__main__":
    main()
