"""What does the fused head save in time and memory, compared with full logits?

    python -m benchmarks.loss [--rows 4] [--length 180] [--share 0.6] [--repeats 5]

Runs one SFT step (LoRA of rank 16, float32) of a small Qwen3 model with the vocabulary of Qwen3.
`fused` is the default of yrunner, `fused_nlirg` the same with NLIRG, `full` computes the logits of
all tokens, as the loss of transformers does. Time is measured in turns in one process, memory in a
separate process for each.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.paths import ROOT
from benchmarks.peak_memory import RETURN_FREED_MEMORY, peak_above_now
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.losses.nlirg import nlirg_weight
from yrunner.losses.targets import PLAIN, TokenWeight
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.model import LoraTuning
from yrunner.tokens import IGNORE_INDEX

VOCABULARY = 151_936
NLIRG = TokenWeight(lambda loss_N, _: nlirg_weight(loss_N))
Step = Callable[[], None]


def build_model() -> torch.nn.Module:
    """Build a model of about 90 M parameters, most of them embeddings."""
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return apply_tuning(AutoModelForCausalLM.from_config(config), LoraTuning(rank=16)).train()


def make_batch(rows: int, length: int, share: float) -> dict[str, Tensor]:
    """Make rows of random tokens; the last `share` of each are targets."""
    ids_BT = torch.randint(VOCABULARY, (rows, length))
    labels_BT = ids_BT.clone()
    labels_BT[:, : round(length * (1 - share))] = IGNORE_INDEX
    return {"input_ids": ids_BT, "labels": labels_BT}


def make_step(way: str, model: torch.nn.Module, batch: dict[str, Tensor]) -> Step:
    """Return a function that runs one update of `model`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    weights: dict[str, TokenWeight] = {"fused": PLAIN, "fused_nlirg": NLIRG}

    def step() -> None:
        if way == "full":
            model(**batch, use_cache=False).loss.backward()
        else:
            targets = measure_targets(model, batch, weights[way])
            (targets.weighted / len(targets.loss_N)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_memory(way: str, batch: dict[str, Tensor]) -> None:
    """Print by how many bytes two steps raise the resident memory above that of the model."""
    model = build_model()
    attach(model)
    step = make_step(way, model, batch)
    with peak_above_now() as peak:
        step()
        step()
    print(peak[0])


def measure_all(arguments: argparse.Namespace, batch: dict[str, Tensor]) -> None:
    """Print seconds and megabytes of each way, and their ratios."""
    ways = ("full", "fused", "fused_nlirg")
    model = build_model()
    attach(model)
    steps = {way: make_step(way, model, batch) for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(arguments.repeats + 1):
        # In alternating order: full logits change the memory that the next way finds.
        for way in ways if repeat % 2 else reversed(ways):
            started = time.perf_counter()
            steps[way]()
            if repeat:  # the first one warms up
                seconds[way].append(time.perf_counter() - started)
    command = [sys.executable, "-m", "benchmarks.loss", *sys.argv[1:], "--memory-of"]
    print(f"{'way':>12} {'seconds':>9} {'peak MB':>9}")
    medians, peaks = {}, {}
    for way in ways:
        result = subprocess.run(
            [*command, way],
            env=os.environ | RETURN_FREED_MEMORY,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        medians[way], peaks[way] = statistics.median(seconds[way]), int(result.stdout.split()[-1])
        print(f"{way:>12} {medians[way]:9.3f} {peaks[way] / 1e6:9.0f}", flush=True)
    print(f"full / fused: time {medians['full'] / medians['fused']:.2f}", end=", ")
    print(f"memory {peaks['full'] / peaks['fused']:.2f}")
    # Pair steps that ran one after the other: the load of the machine may change during the run.
    pairs = zip(seconds["fused_nlirg"], seconds["fused"], strict=True)
    print(f"nlirg / plain: time {statistics.median(a / b for a, b in pairs):.3f}")


def main() -> None:
    """Measure every way; with --memory-of, the memory of one in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=180)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    batch = make_batch(arguments.rows, arguments.length, arguments.share)
    if arguments.memory_of:
        measure_memory(arguments.memory_of, batch)
    else:
        measure_all(arguments, batch)


if __name__ == "__main__":
    main()
