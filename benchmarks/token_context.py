"""How accurate are token batches with a cached context, and what does the cache save?

    yrun train recipes/tiny_base.yaml
    python -m benchmarks.token_context [--windows 32 64 128 256 512] [--recited 0.5]
    python -m benchmarks.token_context --data rows.json --recited 0

Exact: every update runs the example up to its group, with gradient throughout. Window N: keys and
values of the whole example are computed once, when the example starts, without gradient. Updates
then run the last N tokens only and attend to the cached keys and values of all earlier tokens. The
cache grows stale while the weights change during the hundred updates of an example, and no
gradient flows into it.

A trained model first learns to read long documents of known rows, then trains on new documents with
token batches, exactly and with every window. Every tenth group is computed both ways at the same
weights, to compare gradients (cosine) and time. A document is a sequence of rows. The share
`--recited` of them repeats earlier rows, so that only distant context predicts them.
"""

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.paths import ROOT, TOY_DATA
from yrunner.data.batching.collate import collate
from yrunner.data.batching.token_batches import count_groups, cut_group
from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.model import FullTuning, LoraTuning, Tuning
from yrunner.tokens import IGNORE_INDEX

TUNINGS: dict[str, tuple[Tuning, float]] = {
    "full": (FullTuning(kind="full"), 3e-4),
    "lora": (LoraTuning(rank=16, dropout=0.0), 1e-3),
}
"""Each tuning with its learning rate."""
PROMPT, RESPONSE = 200, 1000
"""Tokens of prompt and response in a document."""
GROUP = 10
"""Targets in a token batch."""
EVERY = 10
"""Every tenth group is computed both ways."""
NUM_GROUPS = count_groups(RESPONSE, GROUP)
KeysAndValues = list[tuple[Tensor, Tensor]]
"""Keys and values of every layer."""


@dataclass(frozen=True)
class Comparison:
    """One group computed both ways."""

    cosine: float
    """Cosine of the window's gradient with the exact one."""
    fresh_cosine: float
    """The same with a fresh cache, computed at the current weights."""
    speedup: float


def main() -> None:
    """Print a line for each tuning and window."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "outputs/tiny-base/model")
    parser.add_argument("--windows", nargs="*", type=int, default=[32, 64, 128, 256, 512])
    parser.add_argument("--tunings", nargs="*", choices=list(TUNINGS), default=list(TUNINGS))
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--long-steps", type=int, default=100)
    parser.add_argument("--recited", type=float, default=0.5)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    known, new = read_rows(options.data, options.model)
    draw = random.Random(0)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    attach(model)
    read_long_documents(model, known, options, draw)
    trained = [make_document(new, options.recited, draw) for _ in range(options.documents)]
    others = [make_document(new, options.recited, draw) for _ in range(8)]
    print_use_of_context(model, others, options.windows)
    # A copy of the attached model would still call the forward of that model.
    plain: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    print(f"{'':>6}{'window':>8}{'cosine':>8}{'fresh cosine':>14}{'speedup':>9}{'loss after':>12}")
    for tuning in options.tunings:
        for window in [None, *options.windows]:
            tuned, comparisons = train_on_documents(plain, tuning, trained, window)
            loss = mean_loss(tuned, others)
            print_line(tuning, window, comparisons, loss)


def read_rows(data: Path | None, model: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Tokenize the rows of the long documents, and those of the new documents."""
    paths = [data] if data else [TOY_DATA / "general_train.jsonl", TOY_DATA / "legal_train.jsonl"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    files = []
    for path in paths:
        text = path.read_text("utf-8")
        rows = json.loads(text) if path.suffix == ".json" else map(json.loads, text.splitlines())
        files.append([tokenizer(_text_of(row) + "\n").input_ids for row in rows])
    if data:
        cut = len(files[0]) * 4 // 5
        return files[0][:cut], files[0][cut:]
    return files[0], files[1]


def _text_of(row: dict[str, Any]) -> str:
    """Join the texts of a row or of its messages."""
    messages = row.get("messages")
    texts = [message["content"] for message in messages] if messages else row.values()
    return "\n".join(text for text in texts if isinstance(text, str) and text)


def make_document(
    rows: Sequence[list[int]], recited: float, draw: random.Random
) -> TokenizedExample:
    """Join rows to a document; the tokens after the prompt are targets."""
    seen: list[list[int]] = []
    ids: list[int] = []
    while len(ids) < PROMPT + RESPONSE:
        again = seen and draw.random() < recited
        row = draw.choice(seen if again else rows)
        seen.append(row)
        ids += row
    ids = ids[: PROMPT + RESPONSE]
    labels = [IGNORE_INDEX] * PROMPT + ids[PROMPT:]
    return TokenizedExample(ids, labels, Origin(Path("document"), 1))


def read_long_documents(
    model: Any, rows: Sequence[list[int]], options: argparse.Namespace, draw: random.Random
) -> None:
    """Train the model on long documents of known rows; it has seen short rows only."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(options.long_steps):
        documents = [make_document(rows, options.recited, draw) for _ in range(4)]
        targets = measure_targets(model.train(), collate(documents, 0))
        (targets.weighted / len(targets.loss_N)).backward()
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / options.long_steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"long documents, step {step}: loss {targets.loss_N.mean():.3f}", flush=True)


def print_use_of_context(
    model: Any, documents: Sequence[TokenizedExample], windows: Sequence[int]
) -> None:
    """Print the loss with full context and with the last tokens only."""
    print(f"loss before: {mean_loss(model, documents):.3f}", end="")
    for window in windows:
        losses = []
        for document in documents:
            for group in range(EVERY // 2, NUM_GROUPS, EVERY):
                cut = cut_group(document, group, GROUP)
                batch = {name: ids[:, -window:] for name, ids in collate([cut], 0).items()}
                with torch.no_grad():
                    losses.append(measure_targets(model, batch).loss_N.mean().item())
        print(f", with {window} tokens {statistics.mean(losses):.3f}", end="")
    print(flush=True)


def mean_loss(model: Any, documents: Sequence[TokenizedExample]) -> float:
    """Return the plain loss per target."""
    with torch.no_grad():
        return float(measure_targets(model, collate(documents, 0)).loss_N.mean())


def cache_context(model: Any, document: TokenizedExample) -> KeysAndValues:
    """Compute keys and values of every layer for the whole document."""
    ids_BT = torch.tensor([document.input_ids])
    with torch.no_grad():
        cache = model(input_ids=ids_BT, use_cache=True, logits_to_keep=1).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


def window_batch(cut: TokenizedExample, context: KeysAndValues, window: int) -> dict[str, Any]:
    """Return the last tokens of a cut example, and the cached keys and values before them."""
    start = max(0, len(cut.input_ids) - window)
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(context):
        cache.update(keys[:, :, :start], values[:, :, :start], layer)
    batch: dict[str, Any] = {name: ids[:, start:] for name, ids in collate([cut], 0).items()}
    return batch | {"past_key_values": cache}


def train_on_documents(
    model: Any, tuning: str, documents: Sequence[TokenizedExample], window: int | None
) -> tuple[Any, list[Comparison]]:
    """Train a copy of the model on the documents, group by group; exactly without a window."""
    section, learning_rate = TUNINGS[tuning]
    torch.manual_seed(0)
    tuned: Any = apply_tuning(copy.deepcopy(model), section).train()
    attach(tuned)
    mean_loss(tuned, documents[:1])  # the first call probes the head, which would write to a cache
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    comparisons = []
    for document in documents:
        started = time.perf_counter()
        context = cache_context(tuned, document) if window else []
        cache_seconds = (time.perf_counter() - started) / NUM_GROUPS
        for group in range(NUM_GROUPS):
            cut = cut_group(document, group, GROUP)
            if window and group % EVERY == EVERY // 2:
                comparisons.append(compare(tuned, trained, cut, context, window, cache_seconds))
            batch = window_batch(cut, context, window) if window else collate([cut], 0)
            set_gradients(tuned, trained, batch)
            optimizer.step()
    return tuned, comparisons


def compare(
    model: Any,
    trained: Sequence[Tensor],
    cut: TokenizedExample,
    context: KeysAndValues,
    window: int,
    cache_seconds: float,
) -> Comparison:
    """Compare the gradients of a group at the current weights.

    `cache_seconds`: the group's share of the time that computing `context` took.
    """
    started = time.perf_counter()
    set_gradients(model, trained, collate([cut], 0))
    exact_seconds, exact = time.perf_counter() - started, _joined_gradients(trained)
    started = time.perf_counter()
    set_gradients(model, trained, window_batch(cut, context, window))
    seconds, stale = time.perf_counter() - started + cache_seconds, _joined_gradients(trained)
    set_gradients(model, trained, window_batch(cut, cache_context(model, cut), window))
    fresh = _joined_gradients(trained)
    return Comparison(_cosine(exact, stale), _cosine(exact, fresh), exact_seconds / seconds)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / one.norm() / other.norm())


def set_gradients(model: Any, trained: Sequence[Tensor], batch: dict[str, Any]) -> None:
    """Run forward and backward over one group."""
    for parameter in trained:
        parameter.grad = None
    targets = measure_targets(model, batch)
    (targets.weighted / len(targets.loss_N)).backward()


def _joined_gradients(trained: Sequence[Tensor]) -> Tensor:
    return torch.cat(
        [weight.grad.flatten().double() for weight in trained if weight.grad is not None]
    )


def print_line(tuning: str, window: int | None, comparisons: list[Comparison], loss: float) -> None:
    """Print a line of the table."""
    if window is None:
        print(f"{tuning:>6}{'exact':>8}{'':31}{loss:12.3f}", flush=True)
        return
    cosine = statistics.mean(each.cosine for each in comparisons)
    fresh = statistics.mean(each.fresh_cosine for each in comparisons)
    speedup = statistics.median(each.speedup for each in comparisons)
    print(f"{tuning:>6}{window:8}{cosine:8.3f}{fresh:14.3f}{speedup:9.1f}{loss:12.3f}", flush=True)


if __name__ == "__main__":
    main()
