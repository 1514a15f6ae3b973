"""What do replay rows with KL to the base cost in time and memory?

    python -m benchmarks.keep [--model tiny|vocab] [--updates 20]

Trains LoRA of rank 16 in float32 on updates of eight rows of 128 tokens, half of them targets. With
`keep`, three of the eight rows (a share of 0.33) are replay rows whose predictions are held to the
base by KL. `tiny` is the model of the toy world, `vocab` one with the vocabulary of Qwen. Time is
measured in turns in one process, memory in a separate process for each, weights included.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.peak_memory import RETURN_FREED_MEMORY, peak_above_now
from yrunner.data.batching.collate import collate
from yrunner.data.batching.replay_rows import make_keep_plan
from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.model import LoraTuning
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.replay_loss import HeldRows, MicroBatch

ROWS, KEPT, LENGTH, SHARE_OF_TARGETS = 8, 3, 128, 0.5
SIZES = {
    "tiny": dict(
        vocab_size=1200,
        hidden_size=192,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
    ),
    "vocab": dict(
        vocab_size=151_936,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    ),
}
WAYS = ("none", "keep")
Step = Callable[[], None]


def make_step(way: str, size: str) -> Step:
    """Return a function that runs one update of a new model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", tie_word_embeddings=True, **SIZES[size])
    model = apply_tuning(AutoModelForCausalLM.from_config(config), LoraTuning(rank=16)).train()
    attach(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    examples = make_examples(SIZES[size]["vocab_size"])
    field = examples if way == "none" else examples[KEPT:]
    replay = None if way == "none" else make_replay(examples[:KEPT])

    def step() -> None:
        targets = measure_targets(model, collate(field, 0))
        loss = targets.weighted / len(targets.loss_N)
        if replay is not None:
            kept = replay.loss(model, model, MicroBatch(0, 0, ROWS))
            assert kept is not None, "every update has replay rows"
            loss = loss + kept
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_examples(vocabulary_size: int) -> list[TokenizedExample]:
    """Make rows of random tokens whose second half are targets."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocabulary_size, (ROWS, LENGTH), generator=generator).tolist()
    context = round(LENGTH * (1 - SHARE_OF_TARGETS))
    return [
        TokenizedExample(row, [IGNORE_INDEX] * context + row[context:], Origin(Path("rows"), n))
        for n, row in enumerate(rows)
    ]


def make_replay(examples: list[TokenizedExample]) -> HeldRows:
    """Replay these rows in every update."""
    targets = [len(example.target_positions) for example in examples]
    plan = make_keep_plan(targets, [LENGTH] * KEPT, per_update=KEPT, seed=0)
    return HeldRows(
        examples,
        plan,
        lanes=ROWS - KEPT,
        strength=2.0,
        by_text=False,
        tops=None,
        pad_token_id=0,
    )


def measure_seconds(size: str, updates: int) -> dict[str, float]:
    """Return the median seconds of an update, measured in turns."""
    steps = {way: make_step(way, size) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(updates + 2):
        for way, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[way].append(time.perf_counter() - started)
    return {way: statistics.median(times[2:]) for way, times in seconds.items()}


def measure_memory(way: str, size: str) -> float:
    """Return the peak megabytes of model and updates."""
    command = [sys.executable, "-m", "benchmarks.keep", "--model", size, "--memory-of", way]
    environment = os.environ | RETURN_FREED_MEMORY
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(result.stdout.split()[-1]) / 1e6


def main() -> None:
    """Print time and memory without and with replay, and their ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        with peak_above_now() as peak:
            step = make_step(options.memory_of, options.model)
            step()
            step()
        print(peak[0])
        return
    seconds = measure_seconds(options.model, options.updates)
    memory = {way: measure_memory(way, options.model) for way in WAYS}
    for way in WAYS:
        print(f"{way:5} {1000 * seconds[way]:8.1f} ms per update, {memory[way]:8.1f} MB")
    print(f"keep / none: time {seconds['keep'] / seconds['none']:.2f}, ", end="")
    print(f"memory {memory['keep'] / memory['none']:.2f}")


if __name__ == "__main__":
    main()
