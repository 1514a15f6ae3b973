"""Scoring of rows beside the published way: time, peak memory, share of the matrix rate.

    python -m benchmarks.score [--vocabulary 151936] [--rows 64] [--repeats 3]

Loss and entropy of every target of the rows of sft.py, in float32, with its models of random
weights. `published` runs each row twice, once for losses and once for entropies, and makes the
logits of all its tokens. `ours` is one pass over batches of similar length, logits in chunks and
for targets alone. Every way runs in a process of its own, in turns. Memory is the most that the
process ever held, and what scoring added to that of loading the model; the rate is that of a
product of two large matrices; the work counted is that of the model at all tokens and of the head
at targets, which is all that is needed.
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

from benchmarks.sft import ROOT, SIZES, high_water, save_model, write_rows
from yrunner.scoring.rank import correlation

END = 1
MAX_TOKENS = 2048
"""Padded tokens of a batch."""
NUMBERS = ("seconds", "peak", "added", "share")
RATIOS = ("seconds", "peak")

Row = tuple[list[int], list[int]]
"""Token ids of a prompt, and of its reply with the end."""
Figures = tuple[Tensor, Tensor]
"""Losses and entropies of the targets of a row, both of shape [N]."""
Score = Callable[[], list[Figures]]
"""What is timed."""


def main() -> None:
    """Measure every vocabulary and print its table; or be one of the processes that measure."""
    options = parse_options()
    if options.measure:
        way, folder = options.measure
        print(json.dumps(measure(way, Path(folder))))
        return
    for vocabulary in [options.vocabulary] if options.vocabulary else SIZES:
        with TemporaryDirectory() as name:
            save_model(Path(name) / "model", vocabulary)
            write_rows(Path(name), options.rows, vocabulary)
            found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
            for _ in range(options.repeats):
                for way in WAYS:
                    found[way].append(run_alone(way, name))
                    print(f"{way}: {found[way][-1]['seconds']:.2f} s", file=sys.stderr)
        print_results(vocabulary, found)


def parse_options() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, choices=list(SIZES), help="default: both")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def run_alone(way: str, folder: str) -> dict[str, Any]:
    """What `measure` finds in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.score", "--measure", way, folder]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def measure(way: str, folder: Path) -> dict[str, Any]:
    """Seconds, bytes, share of the matrix rate and mean figures of one way."""
    rows = read_rows(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    score = WAYS[way](model, rows)
    loaded = high_water(os.getpid())
    started = time.perf_counter()
    figures = score()
    seconds = time.perf_counter() - started
    peak = high_water(os.getpid())
    # Imported late: what it imports would count as memory.
    from benchmarks.limit import SQUARE, measure_rate

    rate = measure_rate(torch.randn(SQUARE, SQUARE))
    return {
        "seconds": seconds,
        "peak": peak,
        "added": peak - loaded,
        "rate": rate,
        "share": count_work(model, rows) / seconds / rate,
        "losses": [loss_N.tolist() for loss_N, _ in figures],
        "entropies": [entropy_N.tolist() for _, entropy_N in figures],
    }


def read_rows(folder: Path) -> list[Row]:
    """The rows of sft.py as token ids; what sft_ours.py imports would count as memory."""
    lines = (folder / "rows.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line) for line in lines]
    return [
        ([int(word) for word in row["prompt"].split()], [*map(int, row["completion"].split()), END])
        for row in texts
    ]


def published(model: Any, rows: list[Row]) -> Score:
    """Row by row, two passes: the losses of all tokens, then two distributions of the reply."""
    return lambda: [score_published(model, *row) for row in rows]


@torch.no_grad()
def score_published(model: Any, prompt: list[int], reply: list[int]) -> Figures:
    """Losses and entropies of one row.

    The published code takes the entropies one place later, so that each target's loss meets the
    entropy of the next; here both are of the same target.
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
    """As `yrun sort` does it. Its imports are no part of the time, but of the memory."""
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


WAYS: dict[str, Callable[[Any, list[Row]], Score]] = {"published": published, "ours": ours}


def count_work(model: Any, rows: list[Row]) -> float:
    """Floating-point operations that both figures of all targets cannot do without."""
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


def print_results(vocabulary: int, found: dict[str, list[dict[str, Any]]]) -> None:
    """Medians, and ours over the published way; ratios are of runs that followed each other."""
    print(f"vocabulary {vocabulary:,}")
    print(f"{'way':>12} {'seconds':>8} {'peak GB':>8} {'added GB':>9} {'of the rate':>12}")
    for way, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in NUMBERS}
        print(
            f"{way:>12} {middle['seconds']:8.2f} {middle['peak'] / 1e9:8.2f}"
            f" {middle['added'] / 1e9:9.2f} {middle['share']:12.0%}"
        )
    pairs = list(zip(found["ours"], found["published"], strict=True))
    ratios = {key: statistics.median(a[key] / b[key] for a, b in pairs) for key in RATIOS}
    print(f"{'ratio':>12} {ratios['seconds']:8.2f} {ratios['peak']:8.2f}")
    rates = [run["rate"] for runs in found.values() for run in runs]
    print(f"matrix rate {statistics.median(rates) / 1e9:.0f} GFLOP/s")
    for figure in ("losses", "entropies"):
        print(f"largest difference of {figure}: {largest_difference(pairs[0], figure):.1e}")
    print(f"Spearman of the rows by correlation: {rank_agreement(pairs[0]):.4f}")


def largest_difference(pair: tuple[dict[str, Any], dict[str, Any]], figure: str) -> float:
    """Between the two ways, over all targets."""
    ours, published = (torch.tensor([x for row in run[figure] for x in row]) for run in pair)
    return (ours - published).abs().max().item()


def rank_agreement(pair: tuple[dict[str, Any], dict[str, Any]]) -> float:
    """Spearman's correlation of the two ways' scores: our formula beside the published one."""
    own, other = (list(zip(run["losses"], run["entropies"], strict=True)) for run in pair)
    scores = [
        [correlation(torch.tensor(losses), torch.tensor(entropies)) for losses, entropies in own],
        [published_correlation(losses, entropies) for losses, entropies in other],
    ]
    ranks_2R = torch.tensor(scores, dtype=torch.float64).argsort().argsort()
    return torch.corrcoef(ranks_2R.double())[0, 1].item()


def published_correlation(losses: list[float], entropies: list[float]) -> float:
    """Cosine of both after centring and scaling each."""
    loss_N, entropy_N = (
        (figure_N - figure_N.mean()) / figure_N.std(correction=0)
        for figure_N in (torch.tensor(losses), torch.tensor(entropies))
    )
    return (loss_N @ entropy_N / (loss_N.norm() * entropy_N.norm())).item()


if __name__ == "__main__":
    main()
