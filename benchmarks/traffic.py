"""How accurate is the traffic formula? python -m benchmarks.traffic

Compares the estimate with the bytes that two processes send during an update. They train a small
model over gloo, and the loopback device counts the bytes. Where the machine allows it
(`unshare --net`, as root), they run in a separate network namespace, so that nothing else counts.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory import TUNINGS, full_batch
from benchmarks.processes import run_together
from benchmarks.scaling.traffic_formula import traffic_per_gpu
from yrunner.distributed.collectives import join_ranks
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.models.size import count_weights_of
from yrunner.models.tuning import apply_tuning
from yrunner.training.memory.trace import StepTrace
from yrunner.training.memory.zero import Sharing, Workload

RANKS = 2
UPDATES = 4
CASES = [
    *(("full", stage, 1) for stage in range(4)),
    *(("full", stage, 3) for stage in range(4)),
    *(("lora", stage, 1) for stage in (0, 3)),
]
"""Kind of tuning, ZeRO stage (0: without DeepSpeed), micro-batches per update."""
NO_TRACE = StepTrace(0, 0, ((0, 0),), ((0, 0),), ((0, 0),))
"""Traffic does not depend on memory."""
CONFIG = {
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
    """Print sent and estimated megabytes for every case; with --ranks, run the two processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=Path, metavar="RESULT", help=argparse.SUPPRESS)
    result = parser.parse_args().ranks
    if result:
        run_together(train_all, result, number=RANKS)
        return
    print("tuning  stage  micro-batches  sent MB  estimated MB  ratio")
    for (kind, stage, micro_steps), sent in zip(CASES, measured_bytes(), strict=True):
        job = Workload(NO_TRACE, count_weights_of(make_model(kind)), 4, CONFIG["hidden_size"] ** 2)
        sharing = Sharing(RANKS, stage or None)
        estimated = traffic_per_gpu(job, sharing, micro_steps=micro_steps).total
        print(
            f"{kind:6}  {stage or 'none':5}  {micro_steps:13}  {sent / 1e6:7.2f}  "
            f"{estimated / 1e6:12.2f}  {sent / estimated:5.2f}"
        )


def measured_bytes() -> list[float]:
    """Measure the bytes that each of two processes sends for an update, for every case."""
    with TemporaryDirectory() as folder:
        result = Path(folder) / "bytes.json"
        command = [sys.executable, "-m", "benchmarks.traffic", "--ranks", str(result)]
        if shutil.which("unshare") and os.geteuid() == 0:
            line = f"ip link set lo up; {shlex.join(command)}"
            command = ["unshare", "--net", "sh", "-c", line]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.exists(), done.stderr
        return list(json.loads(result.read_text()))


def train_all(rank: int, result: Path) -> None:
    """Train every case as one of the ranks; rank 0 writes how many bytes each rank sent."""
    join_ranks(deepspeed=True)
    sent = []
    for kind, stage, micro_steps in CASES:
        model = make_model(kind)
        update = (make_updater if stage == 0 else make_zero_updater)(model, stage, micro_steps)
        update()  # the first update sends more, to set up
        distributed.barrier()
        before = sent_bytes()
        for _ in range(UPDATES):
            update()
        distributed.barrier()
        sent.append((sent_bytes() - before) / RANKS / UPDATES)
    if rank == 0:
        result.write_text(json.dumps(sent))
    distributed.barrier()


def make_model(kind: str, config: Mapping[str, Any] = CONFIG) -> Any:
    """Build a small model, the same in every process."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model = apply_tuning(model, TUNINGS[kind]).train()
    attach(model)
    return model


def make_updater(model: Any, _stage: int, micro_steps: int) -> Callable[[], None]:
    """Return an update under DistributedDataParallel, as accelerate wraps it."""
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
    """Return the same update under DeepSpeed."""
    return zero_update(make_zero_engine(model, stage, micro_steps), micro_steps)


def make_zero_engine(model: Any, stage: int, micro_steps: int) -> Any:
    """Create a DeepSpeed engine with the settings of a recipe's `distributed.deepspeed`."""
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    size = model.config.hidden_size
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
    return engine


def zero_update(engine: Any, micro_steps: int) -> Callable[[], None]:
    """Return a function that runs one update with the engine."""
    batch = full_batch(1, 32, num_targets=16)

    def update() -> None:
        for _ in range(micro_steps):
            engine.backward(measure_targets(engine, batch).weighted)
            engine.step()

    return update


def sent_bytes() -> int:
    """Return the bytes that the loopback device has sent since it exists."""
    lines = Path("/proc/net/dev").read_text("ascii").splitlines()
    loopback = next(line for line in lines if line.strip().startswith("lo:"))
    return int(loopback.split(":")[1].split()[8])


if __name__ == "__main__":
    main()
