"""The logits of base and adapters, and of a model's folder, in the memory of one module.

The weights of most models are read as their modules run. Those that transformers changes while it
loads them, such as the experts of a mixture, are loaded as a whole.

Prove that two models are one: their logits on the same tokens, side by side.

Both compute in float32, so that what differs is their weights alone.
"""

# B = rows, T = tokens of the longest, D = hidden size, N = compared tokens, V = vocabulary

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from yrunner.console import progress
from yrunner.models.load import load_model
from yrunner.models.merge.plan import Merge, Weighted, attach_all
from yrunner.models.merge.safetensors_io import open_checkpoint
from yrunner.models.merge.streaming import Read, StreamedModel, build_streamed_model
from yrunner.models.meta import read_config

LOGIT_BYTES = 2**26
"""What the logits of one model may take; of a large vocabulary fewer tokens are compared."""
FEWEST_TOKENS = 128
CHUNK = 64
"""Tokens that are compared at once."""


@dataclass(frozen=True)
class Likeness:
    """How alike the logits of two models are."""

    tokens: int
    """How many predictions were compared."""
    largest_difference: float
    """Of a logit."""
    mean_difference: float
    top1_agreement: float
    """Share of the tokens for which both find the same next token likeliest."""
    mean_kl: float
    """Kullback-Leibler divergence of the second model from the first, nats per token."""

    def as_json(self) -> dict[str, Any]:
        """The figures by their names."""
        return asdict(self)


@dataclass(frozen=True)
class Tolerance:
    """What a likeness has to reach; rounding alone stays well on this side of it."""

    top1_agreement: float
    mean_kl: float
    largest_difference: float = float("inf")

    def faults(self, likeness: Likeness) -> list[str]:
        """What falls short of it, with the figures. A figure that is no number does, too."""
        checks = [
            (
                likeness.largest_difference <= self.largest_difference,
                f"a logit differs by {likeness.largest_difference:.3g} "
                f"(allowed: {self.largest_difference:g})",
            ),
            (
                likeness.top1_agreement >= self.top1_agreement,
                f"the likeliest token is the same for {likeness.top1_agreement:.2%} "
                f"(needed: {self.top1_agreement:.1%})",
            ),
            (
                likeness.mean_kl <= self.mean_kl,
                f"the divergence is {likeness.mean_kl:.3g} nats per token "
                f"(allowed: {self.mean_kl:g})",
            ),
        ]
        return [fault for reached, fault in checks if not reached]


@dataclass(frozen=True)
class Probes:
    """The texts on which models are compared."""

    rows: list[list[int]]
    """Token ids."""

    def __post_init__(self) -> None:
        assert self.rows and all(self.rows), "there is nothing to compare on an empty text"

    @property
    def input_ids_BT(self) -> Tensor:
        """All rows, filled up behind their ends; a causal model never looks there."""
        length = max(map(len, self.rows))
        return torch.tensor([row + [row[-1]] * (length - len(row)) for row in self.rows])

    def places(self, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Row and column of the tokens to compare, shape [N] each, evenly over all of them."""
        spots = [(row, place) for row, ids in enumerate(self.rows) for place in range(len(ids))]
        most = max(FEWEST_TOKENS, LOGIT_BYTES // (4 * vocabulary))
        step = max(1, -(-len(spots) // most))
        rows, columns = zip(*spots[::step], strict=True)
        return torch.tensor(rows), torch.tensor(columns)


@torch.no_grad()
def logits_at(model: Any, probes: Probes) -> Tensor:
    """The logits of a model at the places to compare, shape [N, V], float32 on the CPU."""
    head = model.get_output_embeddings()
    input_ids_BT = probes.input_ids_BT.to(model.device)
    rows_N, columns_N = probes.places(model.config.get_text_config().vocab_size)
    with _only_before(head, rows_N, columns_N):
        logits_1NV = model.eval()(input_ids_BT, use_cache=False).logits
    logits_NV: Tensor = logits_1NV[0].float().cpu()
    return logits_NV


def compare(logits_NV: Tensor, other_NV: Tensor) -> Likeness:
    """How alike the second logits are to the first. A vocabulary may be filled up in one of them.

    Where a logit is not finite, differences and divergence are NaN, which fails every `Tolerance`.
    """
    size = min(logits_NV.shape[1], other_NV.shape[1])
    largest, total, alike, divergence = 0.0, 0.0, 0, 0.0
    for first_NV, second_NV in _chunks(logits_NV[:, :size], other_NV[:, :size]):
        difference_NV = (first_NV - second_NV).abs()
        largest = max(difference_NV.max().item(), largest, key=_nan_first)
        total += difference_NV.sum().item()
        alike += int((first_NV.argmax(1) == second_NV.argmax(1)).sum())
        # In float64: of two models that are nearly one, float32 sums up to less than nothing.
        first_NV, second_NV = (log_softmax(one.double(), 1) for one in (first_NV, second_NV))
        divergence += kl_div(second_NV, first_NV, reduction="sum", log_target=True).item()
    tokens = len(logits_NV)
    return Likeness(tokens, largest, total / (tokens * size), alike / tokens, divergence / tokens)


def _chunks(*both: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(logits_NV, CHUNK) for logits_NV in both), strict=True)


def _nan_first(value: float) -> float:
    return float("inf") if value != value else value


@contextmanager
def _only_before(head: Any, rows_N: Tensor, columns_N: Tensor) -> Iterator[None]:
    """Let the head see only the hidden states of these tokens, as one row."""

    def choose(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTD, *rest = inputs
        return (hidden_BTD[rows_N, columns_N][None], *rest)

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def merge_logits(
    merge: Merge, adapters: Sequence[Weighted], probes: Probes, *, trust_remote_code: bool
) -> Tensor:
    """What base and adapters answer, shape [N, V]."""
    what = "proof, base and adapter"
    if merge.can_stream:
        return _streamed(merge.streamed, merge.read, probes, what)
    base = load_model(
        str(merge.base.folder), dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    return logits_at(attach_all(base, adapters), probes)


def folder_logits(folder: Path, probes: Probes, *, trust_remote_code: bool) -> Tensor:
    """What the model in a folder answers, shape [N, V]."""
    checkpoint = open_checkpoint(str(folder))
    config = read_config(str(folder), trust_remote_code=trust_remote_code)
    streamed = build_streamed_model(config, trust_remote_code=trust_remote_code)
    if set(streamed.names.values()) <= checkpoint.sizes.keys():
        return _streamed(streamed, checkpoint.read, probes, "proof, merged model")
    model = load_model(str(folder), dtype=torch.float32, trust_remote_code=trust_remote_code)
    return logits_at(model, probes)


def _streamed(streamed: StreamedModel, read: Read, probes: Probes, what: str) -> Tensor:
    with progress(what, len(streamed.owners())) as advance:
        with streamed.streaming(read, advance):
            return logits_at(streamed.model, probes)
