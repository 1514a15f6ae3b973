"""Predictions of the base while a model is being trained.

With an adapter the base is the model with its adapter off. If the weights themselves are trained,
the base is gone; its likeliest tokens were cached before.
"""

# Shapes: E = examples, N = targets, K = likeliest tokens

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from yrunner.data.batching.collate import collate
from yrunner.data.batching.packing import batches_by_length
from yrunner.data.conversation import TokenizedExample
from yrunner.losses.fused_head import attach
from yrunner.losses.kl import BasePrediction, TopBase, measure_divergence, predict_base
from yrunner.losses.score_head import same_weights_trained
from yrunner.models.limits import evaluating


@dataclass(frozen=True)
class CachedPredictions:
    """The base's likeliest tokens for every target of some examples, as a file."""

    tops: TopBase
    ends_E: list[int]
    """End index of each example's targets."""

    def of(self, examples: Sequence[int], device: torch.device) -> TopBase:
        """The predictions for some examples, concatenated."""
        starts = [0, *self.ends_E]
        ranges = [torch.arange(starts[example], self.ends_E[example]) for example in examples]
        chosen = torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.long)
        ids_NK, log_NK, log_rest_N = (tensor[chosen] for tensor in vars(self.tops).values())
        return TopBase(ids_NK.long().to(device), log_NK.to(device), log_rest_N.to(device))

    @property
    def mean_rest(self) -> float:
        """Mean mass of the tokens not cached: half the bound on the error of the gradient."""
        return float(self.tops.log_rest_N.double().exp().mean())

    def save(self, path: Path) -> None:
        """Write a file that `load` reads."""
        save_file({**vars(self.tops), "ends_E": torch.tensor(self.ends_E)}, path)

    @classmethod
    def load(cls, path: Path) -> "CachedPredictions":
        """Read what `save` wrote."""
        tensors = load_file(path)
        ends_E = tensors.pop("ends_E").tolist()
        return cls(TopBase(**tensors), ends_E)


def cache_predictions(
    model: Any,
    examples: Sequence[TokenizedExample],
    *,
    top: int,
    pad_token_id: int,
    max_tokens: int,
    temperature: float = 1.0,
    num_tokens: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> CachedPredictions:
    """Predict every target of the examples with `model`, which is still the base.

    `temperature`, `num_tokens`: see `PredictBase`.
    """
    attach(model)
    found: dict[int, TopBase] = {}
    with evaluating(model):
        lengths = [len(example.input_ids) for example in examples]
        for indices in batches_by_length(lengths, max_tokens):
            chosen = [examples[index] for index in indices]
            batch = to_device(collate(chosen, pad_token_id), model.device)
            base = predict_base(
                model, batch, top=top, temperature=temperature, num_tokens=num_tokens
            )
            assert isinstance(base, TopBase)
            sizes = [len(example.target_positions) for example in chosen]
            for index, chunk in zip(indices, _chunks(sizes), strict=True):
                ids_NK, log_NK, log_rest_N = (
                    part.cpu() for part in vars(base.chunk(chunk)).values()
                )
                found[index] = TopBase(ids_NK.int(), log_NK.float(), log_rest_N.float())
            advance(len(indices))
    ordered = [vars(found[index]) for index in range(len(examples))]
    tops = TopBase(**{name: torch.cat([one[name] for one in ordered]) for name in ordered[0]})
    ends_E = torch.tensor([len(one["log_rest_N"]) for one in ordered]).cumsum(0).tolist()
    return CachedPredictions(tops, ends_E)


def predictions_of_base(
    model: Any, batch: Mapping[str, Tensor], examples: Sequence[int], tops: CachedPredictions | None
) -> BasePrediction:
    """The base's predictions for a batch of these examples, in this order.

    Without `tops`, `model` predicts with its adapter off.
    """
    if tops is not None:
        return tops.of(examples, batch["labels"].device)
    with adapter_off(model) as base:
        return predict_base(base, batch)


def measure_divergences(
    model: Any,
    examples: Sequence[TokenizedExample],
    tops: CachedPredictions | None,
    *,
    pad_token_id: int,
    max_tokens: int,
    chosen: Sequence[int] | None = None,
) -> list[Tensor]:
    """KL(base || model) in nats at every target of each example, shape [N] each, in order.

    `tops`: predictions of the base for the examples; None: run the model with its adapter off.
    `chosen`: only the examples with these indices.
    """
    attach(model)
    wanted = range(len(examples)) if chosen is None else chosen
    found: dict[int, Tensor] = {}
    with evaluating(model):
        lengths = [len(examples[index].input_ids) for index in wanted]
        for places in batches_by_length(lengths, max_tokens):
            indices = [wanted[place] for place in places]
            together = [examples[index] for index in indices]
            batch = to_device(collate(together, pad_token_id), model.device)
            with torch.no_grad():
                base = predictions_of_base(model, batch, indices, tops)
                divergence_N = measure_divergence(model, batch, base).divergence_N
            sizes = [len(example.target_positions) for example in together]
            parts = torch.split(divergence_N.double().cpu(), sizes)
            found |= dict(zip(indices, parts, strict=True))
    return [found[index] for index in wanted]


@contextmanager
def adapter_off(model: Any) -> Iterator[Any]:
    """Switch off adapter and dropout, and restore both afterwards."""
    with same_weights_trained(model), evaluating(model), model.disable_adapter():
        yield model


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move the batch to a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _chunks(sizes: Sequence[int]) -> Iterator[slice]:
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return (slice(start, end) for start, end in pairwise(ends))
