"""How accurate is the memory estimate of `yrun check`? python -m benchmarks.memory

Trains sixteen models of random weights on the CPU, each in a separate process, and compares the
peak of the resident memory, less what was resident before the model was built, with the estimate.
The C library returns freed blocks at once, because the estimate does not count unused ones.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from benchmarks.paths import ROOT
from benchmarks.peak_memory import RETURN_FREED_MEMORY, peak_above_now
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.models.load import DTYPES
from yrunner.models.meta import build_fake_model
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.model import FreezeTuning, FullTuning, LoraTuning, Tuning
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.memory.trace import (
    StepTrace,
    mixed_precision,
    trace_step,
    weightless_optimizer,
)

TUNINGS: dict[str, Tuning] = {
    "full": FullTuning(kind="full"),
    "freeze": FreezeTuning(kind="freeze"),
    "lora": LoraTuning(),
}


@dataclass(frozen=True)
class Case:
    """One training: model, tuning and batch."""

    model_type: str
    tuning: str
    hidden_size: int = 512
    num_layers: int = 8
    vocab_size: int = 32_000
    batch_size: int = 4
    length: int = 512
    num_targets: int = 64
    dtype: str = "float32"
    optimizer: str = "adamw_torch"
    accumulation: int = 1
    gradient_checkpointing: bool = False

    def config(self) -> PreTrainedConfig:
        """Return the config of the model."""
        return AutoConfig.for_model(
            self.model_type,
            hidden_size=self.hidden_size,
            intermediate_size=3 * self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=self.vocab_size,
        )


CASES = [
    Case("qwen3", "full"),
    Case("qwen3", "full", gradient_checkpointing=True),
    Case("qwen3", "full", accumulation=2),
    Case("qwen3", "full", num_targets=500),
    Case("qwen3", "full", optimizer="adafactor"),
    Case("qwen3", "full", optimizer="sgd"),
    Case("qwen3", "full", dtype="bfloat16"),
    Case("qwen3", "freeze", dtype="bfloat16"),
    Case("qwen3", "lora"),
    Case("qwen3", "lora", gradient_checkpointing=True),
    Case("qwen3", "lora", dtype="bfloat16"),
    Case("qwen3", "lora", vocab_size=151_936, num_targets=200),
    Case("llama", "full", num_layers=16, batch_size=1, length=2048),
    Case("llama", "lora", num_layers=16, batch_size=1, length=2048),
    Case("gemma2", "full", length=256),
    Case("qwen2", "full", batch_size=1, length=32, num_targets=16),
]


def full_batch(batch_size: int, length: int, num_targets: int) -> dict[str, Tensor]:
    """Make a micro-batch without padding; each row ends with `num_targets` targets.

    The first token of a row is never a target, because no token predicts it.
    """
    input_ids_BT = torch.zeros(batch_size, length, dtype=torch.long)
    labels_BT = torch.full_like(input_ids_BT, IGNORE_INDEX)
    labels_BT[:, max(1, length - num_targets) :] = 0
    return {
        "input_ids": input_ids_BT,
        "labels": labels_BT,
    }


def estimated_bytes(case: Case) -> int:
    """Estimate the peak of one update."""
    dtype = DTYPES[case.dtype]
    trace = trace_step(
        build_fake_model(case.config(), TUNINGS[case.tuning], dtype=dtype),
        full_batch(case.batch_size, case.length, case.num_targets),
        dtype=dtype,
        optimizer=case.optimizer,
        accumulation=case.accumulation,
        gradient_checkpointing=case.gradient_checkpointing,
    )
    assert isinstance(trace, StepTrace), trace.reason
    return trace.peak


def measured_bytes(*cases: Case) -> list[int]:
    """Measure the peak of two updates of each case, one after the other in a separate process."""
    described = [json.dumps(asdict(case)) for case in cases]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--train", *described],
        env=os.environ | RETURN_FREED_MEMORY,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(line) for line in result.stdout.splitlines()[-len(cases) :]]


def train(case: Case) -> int:
    """Run two updates and return by how many bytes the resident memory rose at its peak."""
    torch.set_num_threads(1)  # threads would add stacks, and slow each other down on a busy machine
    dtype = DTYPES[case.dtype]
    gc.collect()  # what an earlier training has left
    with peak_above_now() as peak:
        model = AutoModelForCausalLM.from_config(case.config(), dtype=dtype)
        model = apply_tuning(model, TUNINGS[case.tuning]).train()
        if case.gradient_checkpointing:
            model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        attach(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = weightless_optimizer(case.optimizer, trained, foreach=False)
        batch = full_batch(case.batch_size, case.length, case.num_targets)
        for _ in range(2):  # the first one creates the state of the optimizer
            for _ in range(case.accumulation):
                targets = measure_targets(mixed_precision(model, dtype), batch)
                (targets.weighted / len(targets.loss_N)).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return peak[0]


def compare_all() -> None:
    """Print estimated and measured megabytes and their ratio for every case."""
    print(f"{'estimated':>9} {'measured':>9} {'ratio':>6}  case")
    for case in CASES:
        estimated, [measured] = estimated_bytes(case), measured_bytes(case)
        changed = {
            name: value
            for name, value in asdict(case).items()
            if name in ("model_type", "tuning") or value != getattr(Case, name)
        }
        print(
            f"{estimated / 1e6:9.0f} {measured / 1e6:9.0f} {estimated / measured:6.2f}  "
            + " ".join(f"{name}={value}" for name, value in changed.items()),
            flush=True,
        )


def main() -> None:
    """Compare all cases; with --train, run some in this process and print their peaks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        for case in options.train:
            print(train(Case(**json.loads(case))))
    else:
        compare_all()


if __name__ == "__main__":
    main()
