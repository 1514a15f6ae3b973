"""Bytes that two processes send each other for an update, beside the estimate.

    python -m benchmarks.traffic

Two processes train a small model over gloo, and the loopback device counts what they send. Where
the machine allows it (`unshare --net`, as root), they have a network of their own, so that nothing
else is counted.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory import TUNINGS, full_batch
from yrunner.losses.fused import attach, measure_targets
from yrunner.models.tuning import apply_tuning
from yrunner.models.weight_counts import count_weights_of
from yrunner.training.memory import StepTrace
from yrunner.training.sharing import Job, Layout
from yrunner.training.traffic import traffic_per_gpu

RANKS = 2
UPDATES = 4
NO_TRACE = StepTrace(0, 0, ((0, 0),), ((0, 0),))
"""Traffic does not depend on what is held."""
FORM = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4000,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Print sent and estimated megabytes for every stage, or be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for hidden in ("--kind", "--stage", "--micro-steps"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind is not None:
        work(options.kind, int(options.stage), int(options.micro_steps))
        return
    print("tuning  stage  micro-steps  sent MB  estimated MB  ratio")
    for kind in ("full", "lora"):
        for stage in range(4):
            for micro_steps in (1, 3):
                compare(kind, stage, micro_steps)


def compare(kind: str, stage: int, micro_steps: int) -> None:
    """Print one line."""
    sent = measured_bytes(kind, stage, micro_steps)
    layout = Layout(RANKS, stage or None)
    job = Job(NO_TRACE, count_weights_of(make_model(kind)), 4, FORM["hidden_size"] ** 2)
    estimated = traffic_per_gpu(job, layout, micro_steps=micro_steps).total
    print(
        f"{kind:6}  {stage or 'none':5}  {micro_steps:11}  {sent / 1e6:7.2f}  "
        f"{estimated / 1e6:12.2f}  {sent / estimated:5.2f}",
        flush=True,
    )


def measured_bytes(kind: str, stage: int, micro_steps: int) -> float:
    """Bytes that each of two real processes sent for an update."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.traffic", "--kind", kind]
        command += ["--stage", str(stage), "--micro-steps", str(micro_steps)]
        line = shlex.join(command)
        both = " & ".join(f"RANK={rank} LOCAL_RANK={rank} {line}" for rank in range(RANKS))
        script = f"{both} & wait"
        shell = ["sh", "-c", script]
        if shutil.which("unshare") and os.geteuid() == 0:
            shell = ["unshare", "--net", "sh", "-c", f"ip link set lo up; {script}"]
        here = {
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29611",
            "GLOO_SOCKET_IFNAME": "lo",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "RESULT": str(Path(folder) / "bytes"),
        }
        done = subprocess.run(
            shell, env=os.environ | here, capture_output=True, text=True, check=False
        )
        result = Path(folder) / "bytes"
        assert result.exists(), done.stderr
        return float(result.read_text())


def work(kind: str, stage: int, micro_steps: int) -> None:
    """Train as one of the processes; the first writes how much each has sent for an update."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    model = make_model(kind)
    update = (make_updater if stage == 0 else make_zero_updater)(model, stage, micro_steps)
    update()  # the first update also tells all which weights there are
    distributed.barrier()
    before = sent_bytes()
    for _ in range(UPDATES):
        update()
    distributed.barrier()
    if rank == 0:
        each = (sent_bytes() - before) / RANKS / UPDATES
        Path(os.environ["RESULT"]).write_text(str(each))
    distributed.barrier()
    distributed.destroy_process_group()


def make_model(kind: str) -> Any:
    """A small model, the same in every process."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FORM))
    model = apply_tuning(model, TUNINGS[kind]).train()
    attach(model)
    return model


def make_updater(model: Any, _stage: int, micro_steps: int) -> Callable[[], None]:
    """Plain data parallel, as accelerate makes it."""
    distributed.init_process_group("gloo")
    wrapped = nn.parallel.DistributedDataParallel(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    batch = full_batch(1, 32, num_targets=16)

    def update() -> None:
        with wrapped.no_sync():
            for _ in range(micro_steps - 1):
                measure_targets(wrapped, batch).weighted.backward()
        measure_targets(wrapped, batch).weighted.backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def make_zero_updater(model: Any, stage: int, micro_steps: int) -> Callable[[], None]:
    """DeepSpeed with the settings that the recipe's `distributed.deepspeed` makes."""
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    size = FORM["hidden_size"]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_bucket_size": size**2,
            "stage3_prefetch_bucket_size": int(0.9 * size**2),
            "stage3_param_persistence_threshold": 10 * size,
        },
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained), config=settings
    )
    batch = full_batch(1, 32, num_targets=16)

    def update() -> None:
        for _ in range(micro_steps):
            engine.backward(measure_targets(engine, batch).weighted)
            engine.step()

    return update


def sent_bytes() -> int:
    """What the loopback device has sent since the machine, or the network, is there."""
    lines = Path("/proc/net/dev").read_text("ascii").splitlines()
    loopback = next(line for line in lines if line.strip().startswith("lo:"))
    return int(loopback.split(":")[1].split()[8])


if __name__ == "__main__":
    main()
