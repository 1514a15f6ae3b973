"""Score data with a model: loss, entropy and likeliest token of every target."""

# B = rows, T = tokens, D = hidden size, N = target tokens, C = size of a context

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import takewhile
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import normalize
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from yrunner.data.batching.collate import collate
from yrunner.data.batching.packing import batches_by_length
from yrunner.data.conversation import TokenizedExample
from yrunner.data.dataset.examples import Examples
from yrunner.errors import ModelError, Origin
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.losses.targets import PLAIN, TokenWeight, target_places
from yrunner.machine import look_around
from yrunner.models.limits import check_lengths, evaluating
from yrunner.tokens import IGNORE_INDEX

KEY_VALUE = {DynamicLayer, DynamicSlidingWindowLayer}
"""Layers of a cache of which every row can be taken several times."""
CONTEXT_SIZE = 128
"""Size of the random projection of a hidden state: its cosines are off by less than 0.1."""


@dataclass(frozen=True)
class TokenScores:
    """Scores of the targets of one example, in their order."""

    loss_N: Tensor
    """Cross-entropy in nats."""
    entropy_N: Tensor
    """Entropy of the prediction in nats."""
    weight_N: Tensor
    """Weight that a loss gives each target."""
    top_N: Tensor
    """Id of the likeliest token."""
    origin: Origin
    context_NC: Tensor | None = None
    """If requested: a random projection of the last hidden state before each target, normalised,
    float16. Its cosines approximate those of the hidden states."""


def score_tokens(
    model: Any,
    examples: Sequence[TokenizedExample],
    *,
    pad_token_id: int,
    batch_size: int,
    weight: TokenWeight = PLAIN,
) -> Iterator[TokenScores]:
    """The scores of each example, in their order; consecutive examples share a batch.

    Raises `DataError` if one is longer than the model's positions.
    """
    _check_lengths(model, examples)
    with _measuring(model):
        for start in range(0, len(examples), batch_size):
            yield from _score_batch(
                model, examples[start : start + batch_size], pad_token_id, weight
            )


def sum_losses(
    model: Any,
    groups: Sequence[Sequence[TokenizedExample]],
    *,
    pad_token_id: int,
    batch_size: int,
) -> Iterator[list[float]]:
    """The summed loss in nats of every example, group by group.

    What the examples of a group have in common before their targets is computed once, where the
    model's cache is of keys and values alone; otherwise each example is computed as a whole. A
    batch has at most `batch_size` examples, or those of one group. Raises `DataError` if one is
    longer than the model's positions.
    """
    _check_lengths(model, [example for group in groups for example in group])
    with _measuring(model):
        # The first batch of a model tries the fused head out, which must not happen with a cache.
        for group in groups[:1]:
            list(_score_batch(model, group[:1], pad_token_id, PLAIN))
        for batch in _groups_of(groups, batch_size):
            examples = [example for group in batch for example in group]
            scores = _after_prefixes(model, batch, pad_token_id)
            if scores is None:
                whole = _score_batch(model, examples, pad_token_id, PLAIN)
                scores = [scored.loss_N for scored in whole]
            sums = iter(float(loss_N.double().sum()) for loss_N in scores)
            yield from ([next(sums) for _ in group] for group in batch)


def _groups_of(
    groups: Sequence[Sequence[TokenizedExample]], batch_size: int
) -> Iterator[list[Sequence[TokenizedExample]]]:
    """Consecutive groups, as many as have `batch_size` examples together, at least one."""
    batch: list[Sequence[TokenizedExample]] = []
    for group in groups:
        if batch and sum(map(len, batch)) + len(group) > batch_size:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _after_prefixes(
    model: Any, groups: Sequence[Sequence[TokenizedExample]], pad_token_id: int
) -> list[Tensor] | None:
    """The loss of every target of each example, computed after the prefix that its group shares.

    None where a group shares nothing, or the model keeps more than keys and values.
    """
    sizes = [_shared_length(group) for group in groups]
    cache = DynamicCache(config=model.config)
    keeps_more = {type(layer) for layer in cache.layers} - KEY_VALUE
    takes_positions = "position_ids" in signature(model.base_model.forward).parameters
    if min(sizes) < 1 or keeps_more or not takes_positions:
        return None
    prefixes = [group[0].input_ids[:size] for group, size in zip(groups, sizes, strict=True)]
    widest = max(sizes)
    pads = [widest - size for size in sizes]
    # Padded on the left: then all continuations start in the same column.
    prefix = {
        "input_ids": [[pad_token_id] * pad + ids for pad, ids in zip(pads, prefixes, strict=True)],
        "attention_mask": [[0] * pad + [1] * (widest - pad) for pad in pads],
        "position_ids": [[0] * pad + [*range(widest - pad)] for pad in pads],
    }
    with torch.no_grad():
        model.base_model(**_tensors(prefix, model), past_key_values=cache, use_cache=True)
    owners = [number for number, group in enumerate(groups) for _ in group]
    examples = [example for group in groups for example in group]
    rests = [
        example.input_ids[sizes[owner] :] for owner, example in zip(owners, examples, strict=True)
    ]
    longest = max(map(len, rests))
    more = [longest - len(rest) for rest in rests]
    rest = {
        "input_ids": [ids + [pad_token_id] * pad for ids, pad in zip(rests, more, strict=True)],
        "labels": [
            example.labels[sizes[owner] :] + [IGNORE_INDEX] * pad
            for owner, example, pad in zip(owners, examples, more, strict=True)
        ],
        "attention_mask": [
            prefix["attention_mask"][owner] + [1] * (longest - pad) + [0] * pad
            for owner, pad in zip(owners, more, strict=True)
        ],
        "position_ids": [[*range(sizes[owner], sizes[owner] + longest)] for owner in owners],
    }
    cache.batch_select_indices(torch.tensor(owners, device=model.device))
    with torch.no_grad():
        inputs = {**_tensors(rest, model), "past_key_values": cache}
        loss_N = measure_targets(model, inputs).loss_N
    targets = [len(example.target_positions) for example in examples]
    return list(torch.split(loss_N.cpu(), targets))


def _shared_length(group: Sequence[TokenizedExample]) -> int:
    """Tokens that all have in common, less the last one, which predicts the first target."""
    same = zip(*(example.input_ids for example in group), strict=False)
    common = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, same))
    first = min(next(iter(example.target_positions), 0) for example in group)
    return min(common, first) - 1


def _tensors(rows: Mapping[str, Sequence[Sequence[int]]], model: Any) -> dict[str, Tensor]:
    return {name: torch.tensor(row, device=model.device) for name, row in rows.items()}


def score_by_length(
    model: Any,
    examples: Sequence[TokenizedExample],
    *,
    pad_token_id: int,
    max_tokens: int,
    weight: TokenWeight = PLAIN,
    done: Container[int] = (),
    shard: tuple[int, int] = (0, 1),
    wants_context: bool = False,
) -> Iterator[tuple[int, TokenScores]]:
    """The index and the scores of each example that is not `done`, in batches of similar length.

    Batches are always computed whole: the last digits of a score depend on the batch, and
    interrupted work must end with the same ones. `done` may grow while this runs. `shard`: rank and
    number of the processes that share the batches. Raises `DataError` if an example is longer than
    the model's positions, `ModelError` if `wants_context` and the model hides its hidden states.
    """
    _check_lengths(model, examples)
    rank, num_ranks = shard
    with _measuring(model), ExitStack() as stack:
        contexts = stack.enter_context(_Contexts(model)) if wants_context else None
        for batch in batches_by_length(_lengths(examples), max_tokens)[rank::num_ranks]:
            if all(index in done for index in batch):
                continue
            together = [examples[index] for index in batch]
            scores = _score_batch(model, together, pad_token_id, weight, contexts)
            for index, scored in zip(batch, scores, strict=True):
                if index not in done:
                    yield index, scored


def _check_lengths(model: Any, examples: Sequence[TokenizedExample]) -> None:
    check_lengths(_lengths(examples), lambda index: examples[index].origin, model.config)


def _lengths(examples: Sequence[TokenizedExample]) -> list[int]:
    if isinstance(examples, Examples):
        return examples.lengths.tolist()  # without reading the tokens
    return [len(example.input_ids) for example in examples]


@contextmanager
def _measuring(model: Any) -> Iterator[None]:
    """Attach the fused head and switch dropout off; restore the mode afterwards."""
    attach(model)
    with evaluating(model):
        yield


def _score_batch(
    model: Any,
    examples: Sequence[TokenizedExample],
    pad_token_id: int,
    weight: TokenWeight,
    contexts: "_Contexts | None" = None,
) -> Iterator[TokenScores]:
    look_around()
    batch = collate(examples, pad_token_id)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with torch.no_grad():
        targets = measure_targets(model, batch, weight, wants_top=True)
    assert targets.top_N is not None
    figures = (targets.loss_N, targets.entropy_N, targets.weight_N, targets.top_N)
    sizes = [len(example.target_positions) for example in examples]
    parts = zip(*(torch.split(figure_N.cpu(), sizes) for figure_N in figures), strict=True)
    context_NC = None if contexts is None else contexts.take(batch["labels"])
    seen = [None] * len(sizes) if context_NC is None else torch.split(context_NC, sizes)
    for example, part, context in zip(examples, parts, seen, strict=True):
        loss_N, entropy_N, weight_N, top_N = part
        yield TokenScores(loss_N, entropy_N, weight_N, top_N, example.origin, context)


class _Contexts(AbstractContextManager["_Contexts"]):
    """Record the last hidden states of a model with a forward hook."""

    def __init__(self, model: Any) -> None:
        causal = model.get_base_model() if isinstance(model, PeftModel) else model
        if causal.base_model is causal:
            raise ModelError(
                f"{type(causal).__name__} does not expose its hidden states, which outlier, "
                "knn_loss and unexplained need",
                remedy="choose other scores in sort.score and sort.also",
            )
        self.hidden_BTD = torch.empty(0)
        self.projection_DC = torch.empty(0)
        self.handle = causal.base_model.register_forward_hook(self._record)

    def take(self, labels_BT: Tensor) -> Tensor:
        """The context of each target of the last batch, shape [N, C], on the CPU."""
        is_target_BT, _ = target_places(labels_BT)
        hidden_ND = self.hidden_BTD[:, :-1][is_target_BT].float()
        self.hidden_BTD = torch.empty(0)
        if not len(self.projection_DC):
            # The same for every run and device: the contexts of one corpus may come from several.
            random = torch.Generator().manual_seed(0)
            shape = (hidden_ND.shape[1], CONTEXT_SIZE)
            self.projection_DC = torch.randn(shape, generator=random).to(hidden_ND.device)
        return normalize(hidden_ND @ self.projection_DC, dim=1).half().cpu()

    def _record(self, module: Any, inputs: Any, output: Any) -> None:
        self.hidden_BTD = output.last_hidden_state

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
