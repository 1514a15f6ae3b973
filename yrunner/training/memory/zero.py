"""Memory per GPU of a distributed run, from what a single GPU needs.

Without DeepSpeed every GPU holds everything. DeepSpeed keeps all weights in the dtype of the
computation and a float32 copy of the trained ones. Its ZeRO stages shard the optimizer state with
that copy (1), the gradients too (2), the weights too (3) (Rajbhandari et al., 2020,
https://arxiv.org/abs/1910.02054). Offloading moves the shards to main memory (Ren et al., 2021,
https://arxiv.org/abs/2101.06840).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from yrunner.models.size import WeightCounts

FLOAT32 = 4
"""Bytes of a number."""
BUCKETS = 2
"""One fills while the other is sent (`overlap_comm`)."""
LIVE_NUMBERS = 10**9
"""Weights that ZeRO-3 keeps gathered at most (`stage3_max_live_parameters`)."""


class Update(Protocol):
    """What one update needs on a single device, see trace.py."""

    @property
    def weights(self) -> int: ...

    @property
    def optimizer(self) -> int: ...

    def busiest_compute(self, gradient_share: float, *, copies: bool = True) -> tuple[int, int]: ...

    @property
    def updating(self) -> int: ...


@dataclass(frozen=True)
class Workload:
    """What is trained, independent of how it is sharded."""

    update: Update
    counts: WeightCounts
    bytes_per_number: int
    """2 in bfloat16 and float16, else 4."""
    bucket_numbers: int
    """Gradients that DeepSpeed collects before it sends them (`reduce_bucket_size`); transformers
    takes the square of the hidden size."""
    stored: float | None = None
    """Bytes of a number in the frozen weights of linear layers, where they are quantized."""
    remembered: float = 1.0
    """Optimizer state, as a share of that of `update`."""

    @property
    def optimizer(self) -> int:
        """Bytes of optimizer state on a single device."""
        return round(self.remembered * self.update.optimizer)


@dataclass(frozen=True)
class Sharing:
    """Number of GPUs, and what they shard."""

    gpus: int = 1
    stage: int | None = None
    """ZeRO stage; None: without DeepSpeed."""
    offload: bool = False
    """Whether the optimizer, and under ZeRO-3 the weights, are in main memory."""

    def __str__(self) -> str:
        if self.stage is None:
            return "alone" if self.gpus == 1 else "data parallel"
        return f"ZeRO {self.stage}{', offload' if self.offload else ''}"


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on each GPU at the peak of an update."""

    weights: int
    gradients: int
    optimizer: int
    """Also the float32 copy of the trained weights, under DeepSpeed."""
    activations: int
    """What backward needs, a chunk of logits, the optimizer's working memory."""
    buffers: int
    """Communication buffers."""
    host: int = 0
    """Bytes of main memory per GPU."""

    @property
    def peak(self) -> int:
        """Total on the GPU."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.buffers)
        return sum(parts)


def sharings_for(gpus: int) -> list[Sharing]:
    """The layouts worth considering on this number of GPUs."""
    offloaded = [Sharing(gpus, stage, offload=True) for stage in (2, 3)]
    if gpus == 1:
        return [Sharing(), *offloaded]
    return [Sharing(gpus), *(Sharing(gpus, stage) for stage in (1, 2, 3)), *offloaded]


def memory_per_gpu(workload: Workload, sharing: Sharing) -> GpuMemory:
    """The peak on each GPU."""
    moments = (
        _plain_moments(workload, sharing)
        if sharing.stage is None
        else _zero_moments(workload, sharing)
    )
    return max(moments, key=lambda moment: moment.peak)


def _plain_moments(workload: Workload, sharing: Sharing) -> Iterator[GpuMemory]:
    """Every GPU holds everything; with several, DDP adds buckets the size of the gradients."""
    update, counts = workload.update, workload.counts
    everything = FLOAT32 * counts.trained
    gradients, activations = update.busiest_compute(1.0)
    computing = GpuMemory(
        weights=update.weights - _saved_by_quantizing(workload),
        gradients=gradients,
        optimizer=workload.optimizer,
        activations=activations + _restored(workload),
        buffers=everything if sharing.gpus > 1 else 0,
    )
    yield computing
    yield replace(computing, gradients=everything, activations=update.updating)


def _zero_moments(workload: Workload, sharing: Sharing) -> Iterator[GpuMemory]:
    assert sharing.stage is not None
    size, counts, parts = workload.bytes_per_number, workload.counts, sharing.gpus
    gradient_parts = parts if sharing.stage >= 2 else 1
    part = -(-counts.trained // parts)
    state = FLOAT32 * part + workload.optimizer // parts
    weights, buffers = _weights_and_buffers(workload, sharing)
    share = size / FLOAT32 / gradient_parts
    gradients, activations = workload.update.busiest_compute(share, copies=False)
    host = 0
    if sharing.offload:
        # Gradients arrive there in float32.
        host = state + FLOAT32 * part + (size * counts.total // parts if sharing.stage == 3 else 0)
        state = 0
    computing = GpuMemory(
        weights=weights,
        gradients=round(gradients * share),
        optimizer=state,
        activations=activations + _restored(workload),
        buffers=buffers,
        host=host,
    )
    yield computing
    if not sharing.offload:
        # The step works on its own shard, with gradients in float32.
        working = FLOAT32 * part + workload.update.updating // parts
        held = size * counts.trained // gradient_parts
        yield replace(computing, gradients=held, activations=working, buffers=0)


def _weights_and_buffers(workload: Workload, sharing: Sharing) -> tuple[int, int]:
    """Bytes of the weights that stay on a GPU, and of gather and send buffers."""
    size, counts = workload.bytes_per_number, workload.counts
    sent = BUCKETS * workload.bucket_numbers * size
    if sharing.stage != 3:
        return size * counts.total - _saved_by_quantizing(workload), sent
    gathered = size * min(counts.total, max(LIVE_NUMBERS, counts.largest))
    return 0 if sharing.offload else -(-size * counts.total // sharing.gpus), gathered + sent


def _saved_by_quantizing(workload: Workload) -> int:
    if workload.stored is None:
        return 0
    return round((workload.bytes_per_number - workload.stored) * workload.counts.frozen_in_layers)


def _restored(workload: Workload) -> int:
    """Quantized weights are dequantized for their product, one at a time."""
    return (
        0
        if workload.stored is None
        else workload.bytes_per_number * workload.counts.largest_in_layers
    )
