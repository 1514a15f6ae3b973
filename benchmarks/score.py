"""How fast does `yrun sort` score rows, compared with the published implementation?

    python -m benchmarks.score [--vocabulary 151936] [--rows 64] [--repeats 3]

Computes loss and entropy of every target of the rows of `benchmarks.sft`, in float32, with its
models of random weights. `bfloat16` is ours with products in it; its share is still of float32's
rate. `published` runs each row twice, once for losses and once for entropies, and computes the
logits of all tokens. `ours` makes one pass over batches of similar length, with
logits in chunks and for targets only. Each runs in a separate process, in turns. Memory is the
peak of the process, and how far scoring raised it above loading the model. The share of the rate
compares the operations needed (the model for all tokens, the head for targets) with the speed of a
product of two large matrices.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, softmax
from transformers import AutoModelForCausalLM

from benchmarks.paths import ROOT
from benchmarks.peak_memory import peak_bytes
from benchmarks.sft.inputs import SIZES, read_rows, save_model, write_rows
from yrunner.scoring.rank import correlation

MAX_TOKENS = 2048
"""Padded tokens in a batch."""
NUMBERS = ("seconds", "peak", "added", "share")
RATIOS = ("seconds", "peak")

Row = tuple[list[int], list[int]]
"""Token ids of a prompt, and of its reply with the end-of-sequence token."""
Figures = tuple[Tensor, Tensor]
"""Losses and entropies of the targets of a row, both of shape [N]."""
Score = Callable[[], list[Figures]]
"""The function that is timed."""


def main() -> None:
    """Print a table for each vocabulary; with --measure, run one implementation in this process."""
    options = parse_options()
    if options.measure:
        way, folder = options.measure
        print(json.dumps(measure(way, Path(folder))))
        return
    for vocabulary in [options.vocabulary] if options.vocabulary else SIZES:
        with TemporaryDirectory() as name:
            save_model(Path(name) / "model", vocabulary)
            write_rows(Path(name), options.rows, vocabulary)
            runs: dict[str, list[dict[str, Any]]] = {way: [] for way in IMPLEMENTATIONS}
            for _ in range(options.repeats):
                for way in IMPLEMENTATIONS:
                    runs[way].append(run_alone(way, name))
                    print(f"{way}: {runs[way][-1]['seconds']:.2f} s", file=sys.stderr)
        print_results(vocabulary, runs)


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, choices=list(SIZES), help="default: both")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def run_alone(way: str, folder: str) -> dict[str, Any]:
    """Run `measure` in a separate process and return its figures."""
    command = [sys.executable, "-m", "benchmarks.score", "--measure", way, folder]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def measure(way: str, folder: Path) -> dict[str, Any]:
    """Measure time, memory and share of the matrix rate, and return losses and entropies too."""
    rows = read_rows(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    score = IMPLEMENTATIONS[way](model, rows)
    loaded = peak_bytes()
    started = time.perf_counter()
    figures = score()
    seconds = time.perf_counter() - started
    peak = peak_bytes()
    # Imported late, because its imports would count as memory.
    from benchmarks.limit import SQUARE, measure_rate

    weights = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    rate = measure_rate(torch.randn(SQUARE, SQUARE))
    return {
        "seconds": seconds,
        "peak": peak,
        "added": peak - loaded,
        "rate": rate,
        "share": count_work(weights, rows) / seconds / rate,
        "losses": [loss_N.tolist() for loss_N, _ in figures],
        "entropies": [entropy_N.tolist() for _, entropy_N in figures],
    }


def published(model: Any, rows: list[Row]) -> Score:
    """Score row by row in two passes: losses of all tokens, then entropies of the reply."""
    return lambda: [score_published(model, *row) for row in rows]


@torch.no_grad()
def score_published(model: Any, prompt: list[int], reply: list[int]) -> Figures:
    """Return losses and entropies of one row.

    The published code reads the entropies one position later, so it pairs each target's loss with
    the entropy of the next. Here both belong to the same target.
    """
    ids_1T = torch.tensor([prompt + reply])
    first = len(prompt)
    logits_1TV = model(ids_1T, attention_mask=torch.ones_like(ids_1T)).logits
    shifted_1TV = logits_1TV[:, :-1].contiguous()
    labels_1T = ids_1T[:, 1:].contiguous()
    loss_T = cross_entropy(shifted_1TV.flatten(0, 1), labels_1T.flatten(), reduction="none")
    del logits_1TV, shifted_1TV
    logits_1TV = model(ids_1T, attention_mask=torch.ones_like(ids_1T)).logits
    reply_NV = logits_1TV[0, first - 1 : -1]
    probability_NV, logs_NV = softmax(reply_NV, dim=-1), log_softmax(reply_NV, dim=-1)
    return loss_T[first - 1 :], -torch.sum(probability_NV * logs_NV, dim=-1)


def ours(model: Any, rows: list[Row]) -> Score:
    """Score as `yrun sort` does. Its imports count as memory, not as time."""
    from yrunner.data.conversation import TokenizedExample
    from yrunner.errors import Origin
    from yrunner.scoring.measure import score_by_length
    from yrunner.tokens import IGNORE_INDEX

    examples = [
        TokenizedExample(
            prompt + reply, [IGNORE_INDEX] * len(prompt) + reply, Origin(Path("rows"), number)
        )
        for number, (prompt, reply) in enumerate(rows, 1)
    ]

    def score() -> list[Figures]:
        scores = dict(score_by_length(model, examples, pad_token_id=0, max_tokens=MAX_TOKENS))
        return [(scores[index].loss_N, scores[index].entropy_N) for index in range(len(rows))]

    return score


def ours_in_bfloat16(model: Any, rows: list[Row]) -> Score:
    """The same with products in bfloat16, as `yrun sort` scores where that is faster."""
    from yrunner.scoring.half_products import halve_products

    halve_products(model)
    return ours(model, rows)


IMPLEMENTATIONS: dict[str, Callable[[Any, list[Row]], Score]] = {
    "published": published,
    "ours": ours,
    "bfloat16": ours_in_bfloat16,
}


def count_work(model: Any, rows: list[Row]) -> float:
    """Count the floating-point operations that losses and entropies need at least."""
    from benchmarks.limit import MULTIPLY_AND_ADD

    config = model.config
    lengths = [len(prompt) + len(reply) for prompt, reply in rows]
    num_targets = sum(len(reply) for _, reply in rows)
    in_layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    width = config.num_attention_heads * config.head_dim
    # Causal: half of the square, once for scores and once for values.
    attention = sum(length**2 for length in lengths) * width * config.num_hidden_layers
    head = config.vocab_size * config.hidden_size * num_targets
    return MULTIPLY_AND_ADD * (in_layers * sum(lengths) + attention + head)


def print_results(vocabulary: int, measured: dict[str, list[dict[str, Any]]]) -> None:
    """Print medians, and the median ratio of ours to published, round by round."""
    print(f"vocabulary {vocabulary:,}")
    print(f"{'':>12} {'seconds':>8} {'peak GB':>8} {'added GB':>9} {'of the rate':>12}")
    for way, runs in measured.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in NUMBERS}
        print(
            f"{way:>12} {middle['seconds']:8.2f} {middle['peak'] / 1e9:8.2f}"
            f" {middle['added'] / 1e9:9.2f} {middle['share']:12.0%}"
        )
    for way in ("bfloat16", "ours"):
        pairs = list(zip(measured[way], measured["published"], strict=True))
        ratios = {key: statistics.median(a[key] / b[key] for a, b in pairs) for key in RATIOS}
        print(f"{'ratio of ' + way:>20} {ratios['seconds']:.2f} {ratios['peak']:.2f}")
    rates = [run["rate"] for runs in measured.values() for run in runs]
    print(f"matrix rate {statistics.median(rates) / 1e9:.0f} GFLOP/s")
    for figure in ("losses", "entropies"):
        print(f"largest difference of {figure}: {largest_difference(pairs[0], figure):.1e}")
    print(f"Spearman correlation of the rows' scores: {rank_agreement(pairs[0]):.4f}")


def largest_difference(pair: tuple[dict[str, Any], dict[str, Any]], figure: str) -> float:
    """Return the largest difference between both implementations over all targets."""
    ours, published = (torch.tensor([x for row in run[figure] for x in row]) for run in pair)
    return (ours - published).abs().max().item()


def rank_agreement(pair: tuple[dict[str, Any], dict[str, Any]]) -> float:
    """Return Spearman's correlation of our scores with those of the published formula."""
    own, other = (list(zip(run["losses"], run["entropies"], strict=True)) for run in pair)
    scores = [
        [correlation(torch.tensor(losses), torch.tensor(entropies)) for losses, entropies in own],
        [published_correlation(losses, entropies) for losses, entropies in other],
    ]
    ranks_2R = torch.tensor(scores, dtype=torch.float64).argsort().argsort()
    return torch.corrcoef(ranks_2R.double())[0, 1].item()


def published_correlation(losses: list[float], entropies: list[float]) -> float:
    """Return the cosine of both figures, each centred and scaled."""
    loss_N, entropy_N = (
        (figure_N - figure_N.mean()) / figure_N.std(correction=0)
        for figure_N in (torch.tensor(losses), torch.tensor(entropies))
    )
    return (loss_N @ entropy_N / (loss_N.norm() * entropy_N.norm())).item()


if __name__ == "__main__":
    main()
