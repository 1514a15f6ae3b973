"""How close does a training step come to the speed of a plain matrix product?

    python -m benchmarks.limit [--vocabulary 151936]

Counts the operations that a LoRA step on the model and rows of `benchmarks.sft` needs at least:
every frozen matrix forward and backward to its input, LoRA's matrices also for their gradients,
attention within each example, and the head for targets only. The machine's rate is that of a
product of two large matrices in the same dtype, measured in turns with the step.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.sft.inputs import BATCH_SIZE, SIZES, save_model, write_rows
from benchmarks.sft.ours import load_lora, read_examples
from yrunner.assembly.trainer import layout_for
from yrunner.data.batching.collate import collate
from yrunner.data.conversation import TokenizedExample
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.models.layers.example_attention import attend_by_example
from yrunner.models.layers.llama_layers import shorten_layers
from yrunner.models.limits import isolates_examples

SQUARE = 2048
MULTIPLY_AND_ADD = 2


def main() -> None:
    """Count, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, choices=list(SIZES), default=151_936)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", options.vocabulary)
        write_rows(folder, options.rows, options.vocabulary)
        model, examples = load_lora(folder), read_examples(folder)
    parts = count_work(model, examples)
    needed = sum(parts.values())
    step = make_epoch(model, examples)
    step()
    matrix = torch.randn(SQUARE, SQUARE)
    rates, shares = [], []
    for _ in range(options.repeats):
        rate = measure_rate(matrix)
        seconds = measure_seconds(step)
        rate = (rate + measure_rate(matrix)) / 2
        rates.append(rate)
        shares.append(needed / seconds / rate)
    print(f"{options.rows} rows, {sum(len(example.input_ids) for example in examples):,} tokens")
    for part, work in parts.items():
        print(f"{part:>22}: {work / 1e9:8.1f} GFLOP ({work / needed:.0%})")
    print(f"{'needed':>22}: {needed / 1e9:8.1f} GFLOP")
    print(f"{'matrix rate':>22}: {statistics.median(rates) / 1e9:8.1f} GFLOP/s")
    print(f"{'share reached':>22}: {statistics.median(shares):8.0%}")


def count_work(model: Any, examples: Sequence[TokenizedExample]) -> dict[str, float]:
    """Count the floating-point operations of forward and backward over all examples, by part."""
    config = model.config
    tokens = sum(len(example.input_ids) for example in examples)
    squares = sum(len(example.input_ids) ** 2 for example in examples)
    targets = sum(len(example.target_positions) for example in examples)
    head = config.vocab_size * config.hidden_size
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    frozen = sum(
        p.numel() for name, p in model.named_parameters() if "base_layer" in name and p.dim() == 2
    )
    width = config.num_attention_heads * config.head_dim
    # Causal: half of the square. Scores and values, each once forward and twice backward.
    attention = MULTIPLY_AND_ADD * squares / 2 * width * 2 * 3 * config.num_hidden_layers
    return {
        "head, targets only": MULTIPLY_AND_ADD * head * targets * 2,
        "frozen layers": MULTIPLY_AND_ADD * frozen * tokens * 2,
        "LoRA": MULTIPLY_AND_ADD * lora * tokens * 3,
        "attention": attention,
    }


def make_epoch(model: Any, examples: Sequence[TokenizedExample]) -> Callable[[], None]:
    """Return a function that runs one epoch over the examples, laid out as `yrun train` does."""
    attach(model)
    isolates = attend_by_example(model) or isolates_examples(model)
    shorten_layers(model.train())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    layout = layout_for(model.config, isolates=isolates)
    batches = [
        collate(examples[start : start + BATCH_SIZE], pad_token_id=0, layout=layout)
        for start in range(0, len(examples), BATCH_SIZE)
    ]

    def epoch() -> None:
        for batch in batches:
            targets = measure_targets(model, batch)
            (targets.weighted / len(targets.loss_N)).backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def measure_rate(matrix: torch.Tensor) -> float:
    """Measure the floating-point operations per second of matrix products."""
    times = [measure_seconds(lambda: torch.mm(matrix, matrix)) for _ in range(9)]
    return MULTIPLY_AND_ADD * SQUARE**3 / statistics.median(times)


def measure_seconds(work: Callable[[], object]) -> float:
    """Run the work and return the seconds that it took."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
