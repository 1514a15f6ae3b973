"""Prove that a merge changed nothing: compare two models' logits on the same tokens, in float32.

Weights are read module by module, so it takes the memory of the largest one. Models whose weights
transformers repacks while loading, such as mixtures of experts, are loaded completely.
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
from yrunner.models.merge.plan import Merge, WeightedAdapter, attach_all
from yrunner.models.merge.safetensors_io import SafetensorsFolder, open_checkpoint
from yrunner.models.merge.streaming import Read, StreamedModel, build_streamed_model
from yrunner.models.meta import read_config

LOGIT_BYTES = 2**26
"""Upper bound of one model's logits: fewer tokens of a large vocabulary are compared."""
FEWEST_TOKENS = 128
CHUNK = 64
"""Tokens compared at once."""


@dataclass(frozen=True)
class Probes:
    """Texts on which models are compared."""

    rows: list[list[int]]
    """Token ids."""

    def __post_init__(self) -> None:
        assert self.rows and all(self.rows), "texts must not be empty"

    @property
    def input_ids_BT(self) -> Tensor:
        """All rows, padded on the right, which a causal model ignores."""
        length = max(map(len, self.rows))
        return torch.tensor([row + [row[-1]] * (length - len(row)) for row in self.rows])

    def places(self, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Rows and columns of the tokens to compare, an even selection, shape [N] each."""
        tokens = [(row, column) for row, ids in enumerate(self.rows) for column in range(len(ids))]
        most = max(FEWEST_TOKENS, LOGIT_BYTES // (4 * vocabulary))
        step = max(1, -(-len(tokens) // most))
        rows, columns = zip(*tokens[::step], strict=True)
        return torch.tensor(rows), torch.tensor(columns)


@dataclass(frozen=True)
class LogitAgreement:
    """Agreement of two models' logits."""

    tokens: int
    """Number of predictions compared."""
    largest_difference: float
    """Largest difference of a logit."""
    mean_difference: float
    top1_agreement: float
    """Share of the predictions with the same likeliest token."""
    mean_kl: float
    """Kullback-Leibler divergence of the second model from the first, nats per token."""

    def as_json(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


@dataclass(frozen=True)
class Tolerance:
    """Bounds that rounding alone does not come near."""

    top1_agreement: float
    mean_kl: float
    largest_difference: float = float("inf")

    def faults(self, found: LogitAgreement) -> list[str]:
        """The bounds that are not met, with the figures. NaN never meets one."""
        checks = [
            (
                found.largest_difference <= self.largest_difference,
                f"a logit differs by {found.largest_difference:.3g} "
                f"(allowed: {self.largest_difference:g})",
            ),
            (
                found.top1_agreement >= self.top1_agreement,
                f"the likeliest token is the same for {found.top1_agreement:.2%} "
                f"(needed: {self.top1_agreement:.1%})",
            ),
            (
                found.mean_kl <= self.mean_kl,
                f"the divergence is {found.mean_kl:.3g} nats per token (allowed: {self.mean_kl:g})",
            ),
        ]
        return [fault for reached, fault in checks if not reached]


def merge_logits(
    merge: Merge, adapters: Sequence[WeightedAdapter], probes: Probes, *, trust_remote_code: bool
) -> Tensor:
    """The logits of base and adapters, shape [N, V]."""
    if merge.can_stream:
        return _streamed(merge.streamed, merge.read, probes, "proof, base and adapter")
    base = load_model(
        str(merge.base.folder), dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    return logits_at(attach_all(base, adapters), probes)


def folder_logits(folder: Path, probes: Probes, *, trust_remote_code: bool) -> Tensor:
    """The logits of the model in a folder, shape [N, V]."""
    checkpoint = open_checkpoint(str(folder))
    config = read_config(str(folder), trust_remote_code=trust_remote_code)
    streamed = build_streamed_model(config, trust_remote_code=trust_remote_code)
    if set(streamed.names.values()) <= checkpoint.sizes.keys():
        return _streamed(streamed, checkpoint.read, probes, "proof, merged model")
    model = load_model(str(folder), dtype=torch.float32, trust_remote_code=trust_remote_code)
    return logits_at(model, probes)


def _streamed(streamed: StreamedModel, read: Read, probes: Probes, title: str) -> Tensor:
    with progress(title, len(streamed.owners())) as advance:
        with streamed.streaming(read, advance):
            return logits_at(streamed.model, probes)


@torch.no_grad()
def logits_at(model: Any, probes: Probes) -> Tensor:
    """The logits of the tokens to compare, shape [N, V], float32 on the CPU."""
    head = model.get_output_embeddings()
    input_ids_BT = probes.input_ids_BT.to(model.device)
    rows_N, columns_N = probes.places(model.config.get_text_config().vocab_size)
    with _only_before(head, rows_N, columns_N):
        logits_1NV = model.eval()(input_ids_BT, use_cache=False).logits
    logits_NV: Tensor = logits_1NV[0].float().cpu()
    return logits_NV


@contextmanager
def _only_before(head: Any, rows_N: Tensor, columns_N: Tensor) -> Iterator[None]:
    """Pass only the hidden states of these tokens to the head, as one row."""

    def choose(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTD, *rest = inputs
        return (hidden_BTD[rows_N, columns_N][None], *rest)

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def compare(logits_NV: Tensor, other_NV: Tensor) -> LogitAgreement:
    """Compare logits; the vocabulary of one of them may be padded.

    A logit that is not finite makes differences and divergence NaN, which fails any `Tolerance`.
    """
    size = min(logits_NV.shape[1], other_NV.shape[1])
    largest, total, alike, divergence = 0.0, 0.0, 0, 0.0
    pair = (torch.split(each_NV[:, :size], CHUNK) for each_NV in (logits_NV, other_NV))
    for first_NV, second_NV in zip(*pair, strict=True):
        difference_NV = (first_NV - second_NV).abs()
        largest = max(difference_NV.max().item(), largest, key=_nan_first)
        total += difference_NV.sum().item()
        alike += int((first_NV.argmax(1) == second_NV.argmax(1)).sum())
        # In float64: for nearly equal models a float32 sum can be negative.
        first_NV, second_NV = (log_softmax(one.double(), 1) for one in (first_NV, second_NV))
        divergence += kl_div(second_NV, first_NV, reduction="sum", log_target=True).item()
    tokens = len(logits_NV)
    return LogitAgreement(
        tokens, largest, total / (tokens * size), alike / tokens, divergence / tokens
    )


def largest_weight_error(checkpoint: SafetensorsFolder, model: Any) -> tuple[str, float]:
    """The weight of `model` farthest from that of the same name in a checkpoint, and how far.

    The distance is that of the two tensors over the length of the checkpoint's (Frobenius norms).
    Wrong weights are about 1 apart, whatever the outputs are on a few tokens. Weights that only one
    of them has, such as repacked experts, are left out.
    """
    found, errors = model.state_dict(), {}
    for name in checkpoint.sizes.keys() & found.keys():
        weight = checkpoint.read(name, torch.float32)
        distance = torch.linalg.vector_norm(found[name].float() - weight)
        size = torch.linalg.vector_norm(weight).clamp(min=torch.finfo(torch.float32).tiny)
        errors[name] = float(distance / size)
    name = max(errors, key=lambda name: _nan_first(errors[name]))
    return name, errors[name]


def _nan_first(value: float) -> float:
    return float("inf") if value != value else value
