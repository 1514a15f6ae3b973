"""What the base predicts, when the model has begun to differ from it.

Beneath an adapter the base is still there: the model with its adapter off. Where the weights
themselves are trained it is gone; then its likeliest tokens have been kept on disk.
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
from yrunner.data.conversation import TokenizedExample
from yrunner.losses.fused_head import attach
from yrunner.losses.kl import BaseSide, TopBase, base_side
from yrunner.scoring.measure import batches_by_length


@dataclass(frozen=True)
class KeptTops:
    """The base's likeliest tokens for every target of some examples."""

    tops: TopBase
    ends_E: list[int]
    """Where the targets of each example end."""

    def of(self, examples: Sequence[int], device: torch.device) -> TopBase:
        """Those of some examples, one behind the other."""
        starts = [0, *self.ends_E]
        places = [torch.arange(starts[example], self.ends_E[example]) for example in examples]
        chosen = torch.cat(places) if places else torch.empty(0, dtype=torch.long)
        ids_NK, log_NK, log_rest_N = (tensor[chosen] for tensor in vars(self.tops).values())
        return TopBase(ids_NK.long().to(device), log_NK.to(device), log_rest_N.to(device))

    @property
    def mean_rest(self) -> float:
        """Mean probability of the tokens that are not kept: half the bound on the pull's error."""
        return float(self.tops.log_rest_N.double().exp().mean())

    def save(self, path: Path) -> None:
        """Write a file that `load` reads."""
        save_file({**vars(self.tops), "ends_E": torch.tensor(self.ends_E)}, path)

    @classmethod
    def load(cls, path: Path) -> "KeptTops":
        """Read what `save` wrote."""
        tensors = load_file(path)
        ends_E = tensors.pop("ends_E").tolist()
        return cls(TopBase(**tensors), ends_E)


def keep_tops(
    model: Any,
    examples: Sequence[TokenizedExample],
    *,
    top: int,
    pad_token_id: int,
    max_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> KeptTops:
    """Ask `model`, which is the base still, about every target of the examples."""
    attach(model)
    found: dict[int, TopBase] = {}
    was_training = model.training
    model.eval()
    lengths = [len(example.input_ids) for example in examples]
    for indices in batches_by_length(lengths, max_tokens):
        chosen = [examples[index] for index in indices]
        batch = to_device(collate(chosen, pad_token_id), model.device)
        side = base_side(model, batch, top=top)
        assert isinstance(side, TopBase), "likeliest tokens were asked for"
        sizes = [len(example.target_positions) for example in chosen]
        for index, chunk in zip(indices, _chunks(sizes), strict=True):
            ids_NK, log_NK, log_rest_N = (part.cpu() for part in vars(side.chunk(chunk)).values())
            found[index] = TopBase(ids_NK.int(), log_NK.float(), log_rest_N.float())
        advance(len(indices))
    model.train(was_training)
    ordered = [vars(found[index]) for index in range(len(examples))]
    tops = TopBase(**{name: torch.cat([one[name] for one in ordered]) for name in ordered[0]})
    ends_E = torch.tensor([len(one["log_rest_N"]) for one in ordered]).cumsum(0).tolist()
    return KeptTops(tops, ends_E)


def side_of_base(
    model: Any, batch: Mapping[str, Tensor], examples: Sequence[int], tops: KeptTops | None
) -> BaseSide:
    """What the base predicts for a batch of these examples, in this order.

    `model` is asked with its adapter off where no `tops` are given.
    """
    if tops is not None:
        return tops.of(examples, batch["labels"].device)
    with adapter_off(model) as base:
        return base_side(base, batch)


@contextmanager
def adapter_off(model: Any) -> Iterator[Any]:
    """The model as its base: without adapter and dropout; afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield model
    finally:
        model.train(was_training)


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch where the model is."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _chunks(sizes: Sequence[int]) -> Iterator[slice]:
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return (slice(start, end) for start, end in pairwise(ends))
