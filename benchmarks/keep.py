"""Time per update and peak memory of a run that keeps, beside the same run that does not.

    python -m benchmarks.keep [--model tiny|vocab] [--updates 20]

LoRA r16 in float32, eight rows of 128 tokens in an update, half of them targets. With `keep` three
of the eight (share 0.33) are held to the base by KL. `tiny` is the model of the toy world, `vocab`
one with Qwen's vocabulary. For time both ways take turns in one process; for memory each has a
process of its own; the figure has the weights in it.
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

from benchmarks.memory import GIVE_MEMORY_BACK, peak_above_now
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
    """One update of a new model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", tie_word_embeddings=True, **SIZES[size])
    model = apply_tuning(AutoModelForCausalLM.from_config(config), LoraTuning(rank=16)).train()
    attach(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    examples = make_examples(SIZES[size]["vocab_size"])
    field = examples if way == "none" else examples[KEPT:]
    held = None if way == "none" else hold(examples[:KEPT])

    def step() -> None:
        targets = measure_targets(model, collate(field, 0))
        loss = targets.weighted / len(targets.loss_N)
        if held is not None:
            kept = held.loss(model, model, MicroBatch(0, 0, ROWS))
            assert kept is not None, "the update has kept rows"
            loss = loss + kept
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_examples(vocabulary_size: int) -> list[TokenizedExample]:
    """Rows of random tokens whose second half is learned."""
    chance = torch.Generator().manual_seed(0)
    rows = torch.randint(vocabulary_size, (ROWS, LENGTH), generator=chance).tolist()
    context = round(LENGTH * (1 - SHARE_OF_TARGETS))
    return [
        TokenizedExample(row, [IGNORE_INDEX] * context + row[context:], Origin(Path("rows"), n))
        for n, row in enumerate(rows)
    ]


def hold(examples: list[TokenizedExample]) -> HeldRows:
    """These rows, in every update."""
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


def time_of_ways(size: str, updates: int) -> dict[str, float]:
    """The median seconds of an update, the ways in turns."""
    steps = {way: make_step(way, size) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(updates + 2):
        for way, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[way].append(time.perf_counter() - started)
    return {way: statistics.median(times[2:]) for way, times in seconds.items()}


def memory_of(way: str, size: str) -> float:
    """Megabytes that model and updates hold at the most."""
    command = [sys.executable, "-m", "benchmarks.keep", "--model", size, "--memory-of", way]
    surroundings = os.environ | GIVE_MEMORY_BACK
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=surroundings)
    return int(found.stdout.split()[-1]) / 1e6


def main() -> None:
    """Print the figures of every way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--memory-of", choices=WAYS)
    options = parser.parse_args()
    if options.memory_of:
        with peak_above_now() as peak:
            step = make_step(options.memory_of, options.model)
            step()
            step()
        print(peak[0])
        return
    seconds = time_of_ways(options.model, options.updates)
    memory = {way: memory_of(way, options.model) for way in WAYS}
    for way in WAYS:
        print(f"{way:5} {1000 * seconds[way]:8.1f} ms an update, {memory[way]:8.1f} MB")
    print(f"keep / none: time {seconds['keep'] / seconds['none']:.2f}, ", end="")
    print(f"memory {memory['keep'] / memory['none']:.2f}")


if __name__ == "__main__":
    main()
