"""What a process holds under each ZeRO stage, beside the estimate: python -m benchmarks.zero_memory

Two processes train a small model on the CPU over gloo, in float32. Their highest resident memory
during an update is read, less what was resident before the model was built; building and the first
update, which makes the optimizer's memory, are not in it. Each stage has processes of its own.
"""

import os
import socket
from tempfile import NamedTemporaryFile

import torch
from torch import distributed
from transformers import AutoConfig

from benchmarks.memory import GIVE_MEMORY_BACK, TUNINGS, forget_peak, full_batch, peak_above_now
from benchmarks.traffic import FORM, RANKS, make_model, make_updater, make_zero_updater
from yrunner.models.weight_counts import count_weights_of
from yrunner.models.weightless import build_weightless
from yrunner.ranks import join_ranks
from yrunner.training.memory import StepTrace, trace_step
from yrunner.training.sharing import Job, Sharing, memory_per_gpu

LARGER = FORM | {"hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 8}
"""40 million weights: beside them what else a process holds is small."""
STAGES = (0, 1, 2, 3)
"""0: without DeepSpeed."""
UPDATES = 2


def main() -> None:
    """Print estimated and measured megabytes for every stage."""
    os.environ |= GIVE_MEMORY_BACK
    job = estimated_job()
    print(f"{job.counts.total / 1e6:.1f} million weights, all trained")
    print("stage  measured MB  estimated MB  ratio")
    for stage in STAGES:
        measured = measured_bytes(stage)
        estimated = memory_per_gpu(job, Sharing(RANKS, stage or None)).peak
        print(
            f"{stage or 'none':5}  {measured / 1e6:11.0f}  {estimated / 1e6:12.0f}  "
            f"{estimated / measured:5.2f}",
            flush=True,
        )


def estimated_job() -> Job:
    """The same update for the estimator. DeepSpeed's optimizer steps over all weights at once."""
    model = build_weightless(AutoConfig.for_model(**LARGER), TUNINGS["full"], dtype=torch.float32)
    counts = count_weights_of(model)
    trace = trace_step(
        model,
        full_batch(1, 32, num_targets=16),
        dtype=torch.float32,
        optimizer="adamw_torch",
        foreach=True,
    )
    assert isinstance(trace, StepTrace), trace.reason
    return Job(trace, counts, bytes_per_number=4, bucket_numbers=LARGER["hidden_size"] ** 2)


def measured_bytes(stage: int) -> int:
    """The most that the first of two real processes holds."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with NamedTemporaryFile("r") as result:
        torch.multiprocessing.spawn(_work, (stage, port, result.name), nprocs=RANKS)
        return int(result.read())


def _work(rank: int, stage: int, port: int, result: str) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    # Before memory is looked at: DeepSpeed's code is no part of what a training holds.
    join_ranks(deepspeed=stage > 0)
    with peak_above_now() as peak:
        model = make_model("full", LARGER)
        update = (make_zero_updater if stage else make_updater)(model, stage, 1)
        update()
        forget_peak()
        for _ in range(UPDATES):
            update()
    if rank == 0:
        with open(result, "w", encoding="ascii") as file:
            file.write(str(peak[0]))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
