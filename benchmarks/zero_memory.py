"""What a process holds under each ZeRO stage, beside the estimate: python -m benchmarks.zero_memory

Two processes train a small model on the CPU over gloo, in float32. Their highest resident memory
during an update is read, less what was resident before the model was built; building and the first
update, which makes the optimizer's memory, are not in it. Then a checkpoint is written, and what
the first process holds beyond the training is read. Each stage has processes of its own.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed
from transformers import AutoConfig

from benchmarks.markdown import print_markdown
from benchmarks.memory import GIVE_MEMORY_BACK, TUNINGS, forget_peak, full_batch, peak_above_now
from benchmarks.processes import run_together
from benchmarks.scaling_jobs import saved_tensors_bytes
from benchmarks.traffic import (
    FORM,
    RANKS,
    make_model,
    make_updater,
    make_zero_engine,
    zero_update,
)
from yrunner.distributed.collectives import join_ranks
from yrunner.models.errors import quiet_libraries
from yrunner.models.meta import build_weightless
from yrunner.models.size import count_weights_of
from yrunner.training.deepspeed.state import SHARD_BYTES, ZeroRun
from yrunner.training.memory.trace import StepTrace, trace_step
from yrunner.training.memory.zero import FLOAT32, Sharing, Workload, memory_per_gpu

LARGER = FORM | {"hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 8}
"""40 million weights: beside them what else a process holds is small."""
STAGES = (0, 1, 2, 3)
"""0: without DeepSpeed."""
UPDATES = 2
OPTIMIZER = "adamw_torch"


def main() -> None:
    """Print measured and estimated megabytes for every stage."""
    os.environ |= GIVE_MEMORY_BACK
    job = estimated_job()
    training, saving = [], []
    for stage in STAGES:
        found = measured_bytes(stage)
        layout = Sharing(RANKS, stage or None)
        expected = memory_per_gpu(job, layout).peak
        training.append((str(layout), *_beside(found["training"], expected)))
        if stage:
            moments = _beside(found["optimizer"], saved_at_once(job))
            weights = _beside(found["model"], FLOAT32 * job.counts.total)
            saving.append((str(layout), *moments, *weights))
    print(f"{job.counts.total / 1e6:.1f} million weights, all trained")
    columns = ("", "measured", "estimated", "ratio")
    print_markdown(f"MB of a process during an update, {RANKS} processes:", columns, training)
    columns = ("", "optimizer", "estimated", "ratio", "model", "estimated", "ratio")
    print_markdown("MB of the first process beyond these, while it saves:", columns, saving)


def _beside(measured: float, estimated: float) -> tuple[float, float, float]:
    return measured / 1e6, estimated / 1e6, estimated / measured


def saved_at_once(job: Workload) -> int:
    """Bytes of weights and moments in the memory of the first process, see `ZeroRun.save`.

    A shard of them, and the weight that is gathered next, in as many tensors.
    """
    shard = min(SHARD_BYTES, saved_tensors_bytes(job.counts.total))
    return shard + saved_tensors_bytes(job.counts.largest)


def estimated_job() -> Workload:
    """The same update for the estimator. DeepSpeed's optimizer steps over all weights at once."""
    model = build_weightless(AutoConfig.for_model(**LARGER), TUNINGS["full"], dtype=torch.float32)
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
    """The most that the first of two real processes holds in training, and then while it saves."""
    with TemporaryDirectory() as folder:
        # A fork has read before what the environment says of giving memory back.
        run_together(_work, stage, Path(folder), number=RANKS, method="spawn")
        return dict(json.loads((Path(folder) / "bytes.json").read_text("ascii")))


def _work(rank: int, stage: int, folder: Path) -> None:
    # Before memory is looked at: DeepSpeed's code is no part of what a training holds.
    join_ranks(deepspeed=stage > 0)
    engine: Any = None
    with peak_above_now() as training:
        model = make_model("full", LARGER)
        if stage:
            engine = make_zero_engine(model, stage, 1)
        update = zero_update(engine, 1) if stage else make_updater(model, stage, 1)
        update()
        forget_peak()
        for _ in range(UPDATES):
            update()
    found = {"training": training[0]}
    if stage:
        zero = ZeroRun(_trainer(model, engine, stage))
        found["optimizer"] = _peak_of(lambda: zero.save(folder))
        found["model"] = _peak_of(lambda: _save_model(model, zero, folder))
    if rank == 0:
        (folder / "bytes.json").write_text(json.dumps(found), "ascii")
    distributed.barrier()


def _trainer(model: Any, engine: Any, stage: int) -> Any:
    """As much of a `Trainer` as saving looks at."""
    return SimpleNamespace(
        model=model,
        deepspeed=engine,
        args=SimpleNamespace(optim=OPTIMIZER, device=torch.device("cpu")),
        accelerator=SimpleNamespace(
            state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
        ),
        state=SimpleNamespace(global_step=UPDATES),
    )


def _peak_of(action: Callable[[], None]) -> int:
    with peak_above_now() as peak:
        forget_peak()
        action()
    return peak[0]


def _save_model(model: Any, zero: ZeroRun, folder: Path) -> None:
    weights = zero.whole_weights()
    if weights:
        with quiet_libraries():
            model.save_pretrained(folder, state_dict=weights)


if __name__ == "__main__":
    main()
