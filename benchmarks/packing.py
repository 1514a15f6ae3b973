"""Which layout of a micro-batch is the fastest?

    python -m benchmarks.packing [--repeats 3] [--threads 2] [--models small wide]

Times forward and backward of two Qwen3 models in float32, on examples with lengths like those of
instruction data: log-normal around 180 tokens, at most 1,024. Layouts run in turns and the best
time of each counts, so that load from other programs affects all of them equally.

masked   one row per example, with padding and an attention mask
padded   the same without the mask
packs    one row per pack, with a block mask
joined   all examples in one row, with a block mask
fitted   rows that `fit_rows` chooses
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from yrunner.data.batching.collate import all_in_one_row, collate, fit_rows, one_per_row
from yrunner.data.batching.packing import fill_rate, pack, pack_in_order
from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.tokens import IGNORE_INDEX

MAX_LENGTH = 1024
VOCABULARY_SIZE = 6400
SIZES = {
    "small": {"hidden_size": 256, "num_hidden_layers": 4},
    "wide": {"hidden_size": 512, "num_hidden_layers": 8},
}
Batch = dict[str, torch.Tensor]


def main() -> None:
    """Print fill and speed of packing, then a table for each model and attention."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="*", choices=list(SIZES), default=list(SIZES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_packing()
    for name in options.models:
        for attention in ("sdpa", "eager"):
            print_layouts(name, attention, options.repeats)


def draw_lengths(num_examples: int) -> Any:
    """Draw lengths like those of instruction data."""
    lengths = np.random.default_rng(0).lognormal(np.log(180), 0.7, num_examples)
    return lengths.clip(16, MAX_LENGTH).astype(int)


def print_packing() -> None:
    """Print the time that packing takes and the fill that it reaches."""
    for number in (20_000, 1_000_000):
        lengths = draw_lengths(number)
        for packing in (pack, pack_in_order):
            start = time.perf_counter()
            packs = packing(lengths, MAX_LENGTH)
            seconds = time.perf_counter() - start
            fill = fill_rate(lengths, len(packs), MAX_LENGTH)
            print(f"{packing.__name__:14}{number:10,} examples  {seconds:6.3f} s  {fill:7.2%} full")


def print_layouts(name: str, attention: str, repeats: int) -> None:
    """Time every layout of two micro-batches: four packs, and eight unpacked examples."""
    model = build_model(attention, **SIZES[name])
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    hidden_size = SIZES[name]["hidden_size"]
    lengths = draw_lengths(2000)
    packed = list(pack(lengths, MAX_LENGTH).shuffled(lengths, (0, 0)))[:4]
    for title, rows in (
        ("4 packs", packed),
        ("8 examples", [[example] for example in range(8)]),
    ):
        examples = [make_example(lengths[example]) for row in rows for example in row]
        batches = make_batches(rows, examples, attention, hidden_size)
        best = time_in_turns(model, batches, repeats)
        num_tokens = sum(len(example.input_ids) for example in examples)
        print(f"\n{name}, {num_parameters / 1e6:.1f} M parameters, {attention}, {title}")
        for way, batch in batches.items():
            height, width = batch["input_ids"].shape
            print(
                f"{way:8}{num_tokens / best[way]:8,.0f} tokens/s "
                f"{best['masked'] / best[way]:6.2f} x  {height:3} rows of {width:5}"
                f"{num_tokens / (height * width):7.1%} full"
            )


def build_model(attention: str, **sizes: int) -> Any:
    """Build a Qwen3 model with random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        intermediate_size=3 * sizes["hidden_size"],
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=sizes["hidden_size"] // 8,
        tie_word_embeddings=True,
        **sizes,
    )
    return Qwen3ForCausalLM._from_config(config, attn_implementation=attention)


def make_example(length: int) -> TokenizedExample:
    """Make an example of random tokens; the second half are targets."""
    ids = torch.randint(VOCABULARY_SIZE, (length,)).tolist()
    labels = [IGNORE_INDEX] * (length // 2) + ids[length // 2 :]
    return TokenizedExample(ids, labels, Origin(Path("random"), 1))


def make_batches(
    rows: Sequence[Sequence[int]],
    examples: Sequence[TokenizedExample],
    attention: str,
    hidden_size: int,
) -> dict[str, Batch]:
    """Collate the same examples in every layout."""
    indices = iter(range(len(examples)))
    planned = [[next(indices) for _ in row] for row in rows]
    layouts: dict[str, Callable[[Sequence[int]], list[list[int]]]] = {
        "masked": one_per_row,
        "padded": one_per_row,
        "fitted": partial(fit_rows, hidden_size=hidden_size),
    }
    if len(examples) > len(rows):
        layouts["packs"] = lambda lengths: planned
    if attention != "eager":  # eager attention would keep the whole square, in every layer and head
        layouts["joined"] = all_in_one_row
    batches = {way: collate(examples, 0, layout) for way, layout in layouts.items()}
    masked = batches["masked"]
    lengths_B = torch.tensor([len(example.input_ids) for example in examples])
    positions_T = torch.arange(masked["labels"].shape[1])
    masked["attention_mask"] = (positions_T < lengths_B[:, None]).long()
    return batches


def time_in_turns(model: Any, batches: dict[str, Batch], repeats: int) -> dict[str, float]:
    """Return the best seconds of forward and backward for each layout; losses must agree."""
    best = dict.fromkeys(batches, float("inf"))
    losses: dict[str, float] = {}
    attach(model)
    for _ in range(repeats):
        for way, batch in batches.items():
            model.zero_grad()
            start = time.perf_counter()
            loss = measure_targets(model, batch).weighted
            loss.backward()
            best[way] = min(best[way], time.perf_counter() - start)
            losses[way] = loss.item()
    assert np.ptp(list(losses.values())) < 1e-4 * losses["masked"], losses
    return best


if __name__ == "__main__":
    main()
