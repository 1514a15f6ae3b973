"""What do token batches cost, compared with the published implementation?

    python -m benchmarks.token_batches [--vocabularies 6400 151936] [--tuning lora] [--rounds 3]
    python -m benchmarks.token_batches --data rows.json --tokenizer folder

The published trainer runs the whole row for every ten targets and computes the logits of all
tokens. Ours runs the row up to the last target of the group and computes the logits of the group
only. Two models with equal initial weights, one per implementation, train on the same groups in
turns, and their losses must stay equal. The best time of each group counts, so that load from other
programs affects both equally.

The row has 400 tokens, a tenth of them prompt, like real instruction rows of this length. The timed
groups are spread evenly over its response. With --data, real texts are joined to such a row.

Also prints the share of idle lanes for 1,000 examples with a log-normal number of groups (median
eight, at most about 70), with one queue for all lanes and with balanced queues.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from yrunner.data.batching.collate import collate
from yrunner.data.batching.token_batches import count_groups, count_updates, cut_group
from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.model import FullTuning, LoraTuning
from yrunner.tokens import IGNORE_INDEX

SIZES = {
    6_400: {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    151_936: {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4},
}
"""Model sizes by vocabulary size: 4.8 M parameters, and 90 M with the vocabulary of Qwen3."""
TUNINGS = {"lora": LoraTuning(rank=16, dropout=0.0), "full": FullTuning(kind="full")}


def main() -> None:
    """Print seconds per update of both implementations and their ratio for each vocabulary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabularies", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--tuning", choices=list(TUNINGS), default="lora")
    parser.add_argument("--length", type=int, default=400)
    parser.add_argument("--prompt", type=int, default=40)
    parser.add_argument("--size", type=int, default=10)
    parser.add_argument("--groups", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_idle_lanes()
    print(f"{'vocabulary':>10} {'published':>10} {'ours':>8} {'ratio':>6}  largest difference")
    for vocabulary_size in options.vocabularies:
        example = make_example(options, vocabulary_size)
        compare(vocabulary_size, example, options)


def print_idle_lanes() -> None:
    """Print the share of idle lanes over all updates."""
    generator = np.random.default_rng(0)
    num_groups = generator.lognormal(2.1, 0.7, 1000).round().clip(1).astype(int).tolist()
    order = generator.permutation(1000).tolist()
    print(f"{'lanes':>10} {'one queue':>10} {'balanced':>8}")
    for num_lanes in (4, 16, 64):
        numbers = ([num_groups[it] for it in order], sorted(num_groups, reverse=True))
        updates = [count_updates(it, num_lanes) for it in numbers]
        idle = [1 - sum(num_groups) / (num_lanes * it) for it in updates]
        print(f"{num_lanes:10} {idle[0]:10.1%} {idle[1]:8.1%}")


def make_example(options: argparse.Namespace, vocabulary_size: int) -> TokenizedExample:
    """Make a row of random or real tokens; those after the prompt are targets."""
    if options.data:
        ids = read_ids(options.data, options.tokenizer)[: options.length]
    else:
        torch.manual_seed(1)
        ids = torch.randint(vocabulary_size, (options.length,)).tolist()
    labels = [IGNORE_INDEX] * options.prompt + ids[options.prompt :]
    return TokenizedExample(ids, labels, Origin(options.data or Path("random"), 1))


def read_ids(data: Path, tokenizer: Path) -> list[int]:
    """Tokenize all texts of a JSON array of rows, joined by newlines."""
    rows = json.loads(data.read_text("utf-8"))
    texts = [value for row in rows for value in row.values() if isinstance(value, str)]
    ids: list[int] = AutoTokenizer.from_pretrained(tokenizer)("\n".join(texts)).input_ids
    return ids


def build_model(vocabulary_size: int, tuning: str) -> Any:
    """Build a Qwen3 model with random weights, the same at every call."""
    sizes = SIZES[vocabulary_size]
    config = Qwen3Config(
        vocab_size=vocabulary_size,
        intermediate_size=3 * sizes["hidden_size"],
        num_hidden_layers=4,
        head_dim=64,
        tie_word_embeddings=True,
        **sizes,
    )
    torch.manual_seed(0)
    return apply_tuning(Qwen3ForCausalLM(config), TUNINGS[tuning]).train()


def published_loss(model: Any, example: TokenizedExample, group: int, size: int) -> torch.Tensor:
    """Run the whole row and compute all logits, of which the group uses ten."""
    positions_N = torch.tensor(example.target_positions[group * size : (group + 1) * size])
    ids_BT = torch.tensor([example.input_ids])
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return cross_entropy(logits_BTV[0, positions_N - 1], ids_BT[0, positions_N])


def our_loss(model: Any, example: TokenizedExample, group: int, size: int) -> torch.Tensor:
    """Run the row up to the group and compute the logits of the group."""
    batch = collate([cut_group(example, group, size)], 0)
    targets = measure_targets(model, batch)
    return targets.weighted / len(targets.loss_N)


LOSSES: dict[str, Callable[[Any, TokenizedExample, int, int], torch.Tensor]] = {
    "published": published_loss,
    "ours": our_loss,
}


def compare(vocabulary_size: int, example: TokenizedExample, options: argparse.Namespace) -> None:
    """Train both models on the groups in turns, and print a line."""
    models = {way: build_model(vocabulary_size, options.tuning) for way in LOSSES}
    optimizers = {way: _optimizer(model) for way, model in models.items()}
    attach(models["ours"])
    groups = _spread(count_groups(len(example.target_positions), options.size), options.groups)
    seconds = {(way, group): float("inf") for way in LOSSES for group in groups}
    difference = 0.0
    for turn in range(options.rounds + 1):
        for group in groups:
            losses = {}
            for way, loss_of in LOSSES.items():
                started = time.perf_counter()
                loss = loss_of(models[way], example, group, options.size)
                loss.backward()
                optimizers[way].step()
                optimizers[way].zero_grad()
                taken = time.perf_counter() - started
                losses[way] = loss.item()
                if turn:  # the first one warms up
                    seconds[way, group] = min(seconds[way, group], taken)
            difference = max(difference, abs(losses["published"] - losses["ours"]))
    published, ours = (sum(seconds[way, group] for group in groups) / len(groups) for way in LOSSES)
    print(
        f"{vocabulary_size:10,} {published:10.4f} {ours:8.4f} {ours / published:6.3f}"
        f"  {difference:.1e}",
        flush=True,
    )


def _optimizer(model: Any) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4)


def _spread(num_groups: int, wanted: int) -> Sequence[int]:
    """Pick `wanted` groups, evenly spread: the middle one of each part."""
    wanted = min(wanted, num_groups)
    return [(2 * part + 1) * num_groups // (2 * wanted) for part in range(wanted)]


if __name__ == "__main__":
    main()
