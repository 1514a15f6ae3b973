"""How far an approximate context for token batches is from the exact one, and what it saves.

    yrun train recipes/tiny_base.yaml
    python -m benchmarks.token_context [--windows 32 64 128 256 512] [--recited 0.5]
    python -m benchmarks.token_context --data rows.json --recited 0

Exact: an update runs the example up to its group, all of it with gradient. `window: N`: keys and
values of the whole example are computed once, when the example is begun, without gradient; an
update runs the last N tokens only, over those of all earlier ones. They grow stale while the
weights move through the hundred updates of an example, and no gradient flows into them.

A trained model learns to read long documents of what it knows, then learns new ones with token
batches, exactly and with every window. Along the way of each window, every tenth group is learned
both ways at the same weights, for the cosine of the gradients and the time. A document is rows one
behind the other, of which the share `--recited` was there before: only far context tells these.
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

from yrunner.data.batching.collate import collate
from yrunner.data.batching.token_batches import count_groups, cut_group
from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.losses.fused_head import attach, detach, measure_targets
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.model import FullTuning, LoraTuning, Tuning
from yrunner.tokens import IGNORE_INDEX

ROOT = Path(__file__).parents[1]
TUNINGS: dict[str, tuple[Tuning, float]] = {
    "full": (FullTuning(kind="full"), 3e-4),
    "lora": (LoraTuning(rank=16, dropout=0.0), 1e-3),
}
"""And the learning rate of each."""
PROMPT, RESPONSE = 200, 1000
"""Tokens of a document."""
GROUP = 10
"""Targets of a token batch."""
EVERY = 10
"""Groups between two that are learned both ways."""
NUM_GROUPS = count_groups(RESPONSE, GROUP)
KeysAndValues = list[tuple[Tensor, Tensor]]
"""Of every layer."""


@dataclass(frozen=True)
class Comparison:
    """One group learned both ways."""

    cosine: float
    """Of the window's gradient with the exact one."""
    fresh_cosine: float
    """The same with a far context that is not stale: computed at the weights of now."""
    times_cheaper: float


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
    learned = [make_document(new, options.recited, draw) for _ in range(options.documents)]
    others = [make_document(new, options.recited, draw) for _ in range(8)]
    print_use_of_context(model, others, options.windows)
    detach(model)  # the forward of a copy would still be that of this model
    print(f"{'':>6}{'window':>8}{'cosine':>8}{'not stale':>14}{'cheaper':>9}{'loss after':>12}")
    for tuning in options.tunings:
        for window in [None, *options.windows]:
            tuned, found = learn_documents(model, tuning, learned, window)
            loss = mean_loss(tuned, others)
            print_line(tuning, window, found, loss)


def read_rows(data: Path | None, model: Path) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of rows that the model reads first, and of those that it learns then."""
    folder = ROOT / "recipes/data"
    paths = [data] if data else [folder / "general_train.jsonl", folder / "legal_train.jsonl"]
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
    """A row's own texts, or those of its messages."""
    messages = row.get("messages")
    texts = [message["content"] for message in messages] if messages else row.values()
    return "\n".join(text for text in texts if isinstance(text, str) and text)


def make_document(
    rows: Sequence[list[int]], recited: float, draw: random.Random
) -> TokenizedExample:
    """Rows one behind the other; those after the prompt are learned."""
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
    """Train the model on long documents of what it knows; it has seen short ones only."""
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
    """Print what losses would be if the model saw the last tokens only: what far context tells."""
    print(f"loss before: {mean_loss(model, documents):.3f}", end="")
    for window in windows:
        losses = []
        for document in documents:
            for group in range(EVERY // 2, NUM_GROUPS, EVERY):
                cut = cut_group(document, group, GROUP)
                batch = {name: it[:, -window:] for name, it in collate([cut], 0).items()}
                with torch.no_grad():
                    losses.append(measure_targets(model, batch).loss_N.mean().item())
        print(f", of {window} tokens {statistics.mean(losses):.3f}", end="")
    print(flush=True)


def mean_loss(model: Any, documents: Sequence[TokenizedExample]) -> float:
    """Plain loss per target."""
    with torch.no_grad():
        return float(measure_targets(model, collate(documents, 0)).loss_N.mean())


def far_context(model: Any, document: TokenizedExample) -> KeysAndValues:
    """Keys and values of every layer for the whole document."""
    ids_BT = torch.tensor([document.input_ids])
    with torch.no_grad():
        cache = model(input_ids=ids_BT, use_cache=True, logits_to_keep=1).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


def window_batch(cut: TokenizedExample, far: KeysAndValues, window: int) -> dict[str, Any]:
    """The last tokens of a cut example, and the keys and values of those before them."""
    start = max(0, len(cut.input_ids) - window)
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(far):
        cache.update(keys[:, :, :start], values[:, :, :start], layer)
    batch: dict[str, Any] = {name: it[:, start:] for name, it in collate([cut], 0).items()}
    return batch | {"past_key_values": cache}


def learn_documents(
    model: Any, tuning: str, documents: Sequence[TokenizedExample], window: int | None
) -> tuple[Any, list[Comparison]]:
    """A copy of the model that has learned the documents group by group; no window: exactly."""
    section, learning_rate = TUNINGS[tuning]
    torch.manual_seed(0)
    tuned: Any = apply_tuning(copy.deepcopy(model), section).train()
    attach(tuned)
    mean_loss(tuned, documents[:1])  # the head tries itself out, which would write to a cache
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    comparisons = []
    for document in documents:
        started = time.perf_counter()
        far = far_context(tuned, document) if window else []
        far_seconds = (time.perf_counter() - started) / NUM_GROUPS
        for group in range(NUM_GROUPS):
            cut = cut_group(document, group, GROUP)
            if window and group % EVERY == EVERY // 2:
                comparisons.append(compare(tuned, trained, cut, far, window, far_seconds))
            batch = window_batch(cut, far, window) if window else collate([cut], 0)
            set_gradients(tuned, trained, batch)
            optimizer.step()
    return tuned, comparisons


def compare(
    model: Any,
    trained: Sequence[Tensor],
    cut: TokenizedExample,
    far: KeysAndValues,
    window: int,
    far_seconds: float,
) -> Comparison:
    """Both gradients of a group at the weights of now. `far_seconds`: its share of `far`."""
    started = time.perf_counter()
    set_gradients(model, trained, collate([cut], 0))
    exact_seconds, exact = time.perf_counter() - started, _joined_gradients(trained)
    started = time.perf_counter()
    set_gradients(model, trained, window_batch(cut, far, window))
    seconds, stale = time.perf_counter() - started + far_seconds, _joined_gradients(trained)
    set_gradients(model, trained, window_batch(cut, far_context(model, cut), window))
    fresh = _joined_gradients(trained)
    return Comparison(_cosine(exact, stale), _cosine(exact, fresh), exact_seconds / seconds)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / one.norm() / other.norm())


def set_gradients(model: Any, trained: Sequence[Tensor], batch: dict[str, Any]) -> None:
    """Forward and backward pass over one group."""
    for parameter in trained:
        parameter.grad = None
    targets = measure_targets(model, batch)
    (targets.weighted / len(targets.loss_N)).backward()


def _joined_gradients(trained: Sequence[Tensor]) -> Tensor:
    return torch.cat([it.grad.flatten().double() for it in trained if it.grad is not None])


def print_line(tuning: str, window: int | None, found: list[Comparison], loss: float) -> None:
    """Print what came of one way through the documents."""
    if window is None:
        print(f"{tuning:>6}{'exact':>8}{'':31}{loss:12.3f}", flush=True)
        return
    cosine = statistics.mean(it.cosine for it in found)
    fresh = statistics.mean(it.fresh_cosine for it in found)
    cheaper = statistics.median(it.times_cheaper for it in found)
    print(f"{tuning:>6}{window:8}{cosine:8.3f}{fresh:14.3f}{cheaper:9.1f}{loss:12.3f}", flush=True)


if __name__ == "__main__":
    main()
