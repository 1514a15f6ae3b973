"""What does bfloat16 save on this processor, and does a model learn as much as in float32?

    python -m benchmarks.precision MODEL [--updates 200] [--tokens 64] [--peft] [--profile]

MODEL is a folder of Hugging Face, such as the one that `yrun train recipes/port_sft.yaml` leaves
in `outputs/.bases`. LoRA of rank 16 is trained on the rows of `benchmarks.whole_command`, from the
same start and on the same batches in each precision, update by update in turns. Time is that of the
processor, so that other programs count less; the limit is the time that the necessary products
would take at the rate of two square matrices. `--peft` adds bfloat16 as peft computes it under
autocast. Memory is measured in a process for each precision. `--profile` says instead what an
update's time goes into, by torch's profiler.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.limit import MULTIPLY_AND_ADD, SQUARE, count_work
from benchmarks.markdown import print_markdown
from benchmarks.paths import ROOT
from benchmarks.peak_memory import RETURN_FREED_MEMORY, peak_bytes, reset_peak, resident_bytes
from benchmarks.whole_command import write_rows
from yrunner.assembly.run import Run
from yrunner.assembly.trainer import layout_for, untrained_model
from yrunner.data.batching.collate import collate
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.models.layers.example_attention import attend_by_example
from yrunner.models.layers.llama_layers import shorten_layers
from yrunner.training.memory.trace import mixed_precision

BATCH_SIZE = 4
UPDATES_OF_MEMORY = 4
UPDATES_OF_A_LINE = 20
UPDATES_TO_WARM_UP = 2
THIN = 64
"""Products with a size up to this are LoRA's."""
PRODUCTS = ("mm", "addmm", "addmm_", "linear")
PARTS = {
    "attention": ("scaled_dot_product", "bmm", "softmax", "_HalfAttention"),
    "activation of the MLP": ("silu",),
    "optimizer": ("adam", "Optimizer"),
    "copies and conversions": ("aten::copy_", "aten::cat", "aten::clone"),
    "passes over activations": tuple(
        f"aten::{name}" for name in "mul add sub neg pow mean sum rsqrt square div".split()
    ),
}
"""Names of torch's operations, or parts of them; the first that fits."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bfloat16, peft": torch.bfloat16}


@dataclass
class Way:
    """A model in one precision, its losses, and the seconds of each update."""

    name: str
    dtype: torch.dtype
    model: Any
    run: Run
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def updater(self, learning_rate: float) -> Callable[[Any], None]:
        """A function that learns from one batch."""
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=True)
        called = mixed_precision(self.model.train(), self.dtype)

        def update(batch: Any) -> None:
            began = time.process_time()
            targets = measure_targets(called, batch)
            loss = targets.weighted / len(targets.loss_N)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            self.seconds.append(time.process_time() - began)
            self.losses.append(float(loss.detach()))

        return update


def main() -> None:
    """Train in turns and print two tables; with --memory-of, a few updates in one precision."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a row, about")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--peft", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--memory-of", choices=list(DTYPES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.profile and options.updates <= UPDATES_TO_WARM_UP:
        parser.error(f"--profile needs more than {UPDATES_TO_WARM_UP} updates, which only warm up")
    with TemporaryDirectory() as name:
        recipe = write_recipe(Path(name), options)
        if options.memory_of:
            print_memory(recipe, options)
            return
        names = list(DTYPES)[: 3 if options.peft else 2]
        ways = [load(recipe, name) for name in names]
        if options.profile:
            print_profile(ways, options)
            return
        compare(ways, options)
        print_memories(names)


def compare(ways: Sequence[Way], options: argparse.Namespace) -> None:
    """Train in turns, and print losses and times."""
    train(ways, batches_of(ways[0], options.updates), options.learning_rate)
    print_losses(ways)
    print_cost(ways)


def write_recipe(folder: Path, options: argparse.Namespace) -> Path:
    """Rows, and a recipe that trains on them."""
    write_rows(folder, options.updates * BATCH_SIZE, options.tokens)
    recipe = {
        "name": "precision",
        "output": str(folder / "run"),
        "model": {"base": str(options.model.resolve())},
        "tuning": {"kind": "lora", "rank": 16, "alpha": 32, "dropout": 0.0},
        "data": {"max_length": 4 * options.tokens, "train": [{"file": "rows.jsonl"}]},
    }
    path = folder / "precision.yaml"
    path.write_text(json.dumps(recipe), "utf-8")  # JSON is YAML
    return path


def load(recipe: Path, name: str) -> Way:
    """The model of the recipe, ready to be trained in a precision."""
    dtype = DTYPES[name]
    run = Run.load(recipe, [f"model.dtype={str(dtype).removeprefix('torch.')}"])
    model = untrained_model(run)
    model.config.use_cache = False
    attach(model)
    attend_by_example(model)
    if name != "bfloat16, peft":
        shorten_layers(model)
    return Way(name, dtype, model, run)


def batches_of(way: Way, number: int) -> list[Any]:
    """The rows in batches, in their order."""
    examples = list(islice(cycle(way.run.dataset.train.examples), number * BATCH_SIZE))
    layout = layout_for(way.model.config, isolates=True)
    return [
        collate(examples[start : start + BATCH_SIZE], pad_token_id=0, layout=layout)
        for start in range(0, len(examples), BATCH_SIZE)
    ]


def train(ways: Sequence[Way], batches: Sequence[Any], learning_rate: float) -> None:
    """Train all models on each batch before the next, now this one first, now that."""
    updates = [way.updater(learning_rate) for way in ways]
    for number, batch in enumerate(batches):
        for update in updates if number % 2 else reversed(updates):
            update(batch)
        if number % UPDATES_OF_A_LINE == UPDATES_OF_A_LINE - 1:
            last = [statistics.mean(way.losses[-UPDATES_OF_A_LINE:]) for way in ways]
            print(number + 1, *(f"{loss:.4f}" for loss in last), file=sys.stderr, flush=True)


def print_memory(recipe: Path, options: argparse.Namespace) -> None:
    """Print what this process holds with libraries, with the model, and at the peaks."""
    libraries = resident_bytes()
    way = load(recipe, options.memory_of)
    batches = batches_of(way, UPDATES_OF_MEMORY)
    loading, model = peak_bytes(), resident_bytes()
    reset_peak()
    train([way], batches, options.learning_rate)
    print(libraries, model, loading, peak_bytes())


def print_memories(names: Sequence[str]) -> None:
    """Train in a process for each precision, and print what it holds."""
    rows = []
    for name in names:
        command = [sys.executable, "-m", "benchmarks.precision", *sys.argv[1:], "--memory-of", name]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | RETURN_FREED_MEMORY,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows.append([name, *(f"{int(it) / 1e9:.2f}" for it in done.stdout.split()[-4:])])
    columns = ("precision", "libraries", "and the model", "peak, loading", "peak, updates")
    print_markdown("Memory of the process, GB", columns, rows)


def print_profile(ways: Sequence[Way], options: argparse.Namespace) -> None:
    """What the updates but the first two spend their time on, as shares of all of it."""
    batches = batches_of(ways[0], options.updates)
    shares: dict[str, dict[str, float]] = {}
    for way in ways:
        update = way.updater(options.learning_rate)
        for batch in batches[:UPDATES_TO_WARM_UP]:
            update(batch)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            for batch in batches[UPDATES_TO_WARM_UP:]:
                update(batch)
        vocabulary = way.model.config.get_text_config().vocab_size
        for event in profiler.events():
            part = part_of(event.name, event.input_shapes, vocabulary)
            of_part = shares.setdefault(part, {})
            of_part[way.name] = of_part.get(way.name, 0.0) + event.self_cpu_time_total
    whole = {way.name: sum(part.get(way.name, 0.0) for part in shares.values()) for way in ways}
    rows = [
        [part, *(f"{times.get(name, 0.0) / whole[name]:.1%}" for name in whole)]
        for part, times in sorted(shares.items(), key=lambda it: -sum(it[1].values()))
    ]
    print_markdown("Shares of the time of an update", ["part", *whole], rows)


def part_of(operation: str, shapes: Sequence[Sequence[int]], vocabulary_size: int) -> str:
    """What an operation of torch belongs to."""
    sizes = [size for shape in shapes if isinstance(shape, list) for size in shape]
    if operation.removeprefix("aten::") in PRODUCTS:
        if vocabulary_size in sizes:
            return "head"
        return "products of LoRA" if min(sizes, default=0) <= THIN else "products of frozen weights"
    if vocabulary_size in sizes:
        return "softmax and losses"
    for part, marks in PARTS.items():
        if any(mark in operation for mark in marks):
            return part
    return "other operations" if operation.startswith("aten::") else "autograd and Python"


def print_losses(ways: Sequence[Way]) -> None:
    """Mean losses of the quarters in float32, and what the other precisions differ from them."""
    first, *others = ways
    size = max(1, len(first.losses) // 4)
    starts = range(0, size * 4, size)
    rows = []
    for way in ways:
        gaps = [mine - theirs for mine, theirs in zip(way.losses, first.losses, strict=True)]
        shown, form = (gaps, "+.4f") if way in others else (way.losses, ".4f")
        means = [statistics.mean(shown[start : start + size]) for start in starts]
        rows.append([way.name, format(shown[0], form), *(format(mean, form) for mean in means)])
    columns = ("precision", "first", *(f"{start + 1} to {start + size}" for start in starts))
    print_markdown("Loss in nats; the others: beside float32", columns, rows)


def print_cost(ways: Sequence[Way]) -> None:
    """Processor time of an update, beside float32 and beside the limit."""
    work = count_work(ways[0].model, ways[0].run.dataset.train.examples)
    needed = sum(work.values()) / len(ways[0].seconds)
    rows = []
    for way in ways:
        rate = rate_of_squares(way.dtype)
        own, base = way.seconds[1:], ways[0].seconds[1:]
        ratio = statistics.median(mine / theirs for mine, theirs in zip(own, base, strict=True))
        reached = needed / statistics.mean(own) / rate
        cells = (f"{statistics.mean(own):.3f}", f"{ratio:.2f}", f"{rate / 1e9:.0f}")
        rows.append([way.name, *cells, f"{reached:.0%}"])
    title = f"{needed / 1e9:.0f} GFLOP per update, threads: {torch.get_num_threads()}"
    columns = ("precision", "s per update", "ratio", "GFLOP/s of squares", "share reached")
    print_markdown(title, columns, rows)


def rate_of_squares(dtype: torch.dtype) -> float:
    """Operations per second of processor time of a product of two large matrices."""
    matrix, seconds = torch.randn(SQUARE, SQUARE).to(dtype), []
    for _ in range(5):
        began = time.process_time()
        torch.mm(matrix, matrix)
        seconds.append(time.process_time() - began)
    return float(MULTIPLY_AND_ADD * SQUARE**3 / statistics.median(seconds))


if __name__ == "__main__":
    main()
