"""Time and peak memory of a step, fused head beside full logits: python benchmarks/loss.py

One SFT step (LoRA r16, float32) of a model in Qwen3's form with its vocabulary. Every way is run in
a process of its own for memory, and in turns in one process for time. `fused` is the default;
`full` makes the logits of all tokens, as transformers' own loss does.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory import GIVE_MEMORY_BACK, peak_above_now
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
    """About 90 M parameters, most of them embeddings."""
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
    """Rows whose last `share` are targets, as a reply behind its question."""
    ids_BT = torch.randint(VOCABULARY, (rows, length))
    labels_BT = ids_BT.clone()
    labels_BT[:, : round(length * (1 - share))] = IGNORE_INDEX
    return {"input_ids": ids_BT, "labels": labels_BT}


def make_step(way: str, model: torch.nn.Module, batch: dict[str, Tensor]) -> Step:
    """One update of `model`."""
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
    """Print the bytes by which resident memory rises over that of the model, in two steps."""
    model = build_model()
    attach(model)
    step = make_step(way, model, batch)
    with peak_above_now() as peak:
        step()
        step()
    print(peak[0])


def measure_all(arguments: argparse.Namespace, batch: dict[str, Tensor]) -> None:
    """Print seconds and megabytes of every way, and the ratios that count."""
    ways = ("full", "fused", "fused_nlirg")
    model = build_model()
    attach(model)
    steps = {way: make_step(way, model, batch) for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(arguments.repeats + 1):
        # In both directions: what runs behind full logits finds another memory.
        for way in ways if repeat % 2 else reversed(ways):
            started = time.perf_counter()
            steps[way]()
            if repeat:  # the first is for warming up
                seconds[way].append(time.perf_counter() - started)
    command = [sys.executable, "-m", "benchmarks.loss", *sys.argv[1:], "--memory-of"]
    root = Path(__file__).parents[1]
    print(f"{'way':>12} {'seconds':>9} {'peak MB':>9}")
    medians, peaks = {}, {}
    for way in ways:
        result = subprocess.run(
            ["env", *(f"{k}={v}" for k, v in GIVE_MEMORY_BACK.items()), *command, way],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
        medians[way], peaks[way] = statistics.median(seconds[way]), int(result.stdout.split()[-1])
        print(f"{way:>12} {medians[way]:9.3f} {peaks[way] / 1e6:9.0f}", flush=True)
    print(f"full / fused: time {medians['full'] / medians['fused']:.2f}", end=", ")
    print(f"memory {peaks['full'] / peaks['fused']:.2f}")
    # Pairs of neighbours in time: the machine may be busier in one half of the run.
    pairs = zip(seconds["fused_nlirg"], seconds["fused"], strict=True)
    print(f"nlirg / plain: time {statistics.median(a / b for a, b in pairs):.3f}")


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=180)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of")
    arguments = parser.parse_args()
    batch = make_batch(arguments.rows, arguments.length, arguments.share)
    if arguments.memory_of:
        measure_memory(arguments.memory_of, batch)
    else:
        measure_all(arguments, batch)


if __name__ == "__main__":
    main()
