"""Memory of each of many GPUs that train together: what one needs alone, shared out.

Without DeepSpeed every GPU holds everything. DeepSpeed keeps all weights in the dtype of the
computation and a float32 copy of those that are trained, and its ZeRO stages share out more and
more: 1 the optimizer's state with that copy, 2 the gradients too, 3 the weights too (Rajbhandari et
al., 2020, https://arxiv.org/abs/1910.02054). Offloading moves what is shared out to the machine's
memory (Ren et al., 2021, https://arxiv.org/abs/2101.06840).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from yrunner.models.size import WeightCounts

FLOAT32 = 4
"""Bytes of a number."""
BUCKETS = 2
"""One is filled while the other is sent (`overlap_comm`)."""
LIVE_NUMBERS = 10**9
"""Weights that ZeRO-3 keeps gathered at most (`stage3_max_live_parameters`)."""


class Update(Protocol):
    """What one update needs on a single device, see memory.py."""

    @property
    def weights(self) -> int: ...

    @property
    def optimizer(self) -> int: ...

    def busiest_compute(self, gradient_share: float, *, copies: bool = True) -> tuple[int, int]: ...

    @property
    def updating(self) -> int: ...


@dataclass(frozen=True)
class Workload:
    """What is trained, in numbers that do not depend on how it is shared out."""

    update: Update
    counts: WeightCounts
    bytes_per_number: int
    """2 where it is computed in bfloat16 or float16, else 4."""
    bucket_numbers: int
    """Gradients that DeepSpeed collects before it sends them (`reduce_bucket_size`); transformers
    takes the square of the hidden size."""
    stored: float | None = None
    """Bytes of a number in the frozen weights of linear layers, where they are quantized."""
    remembered: float = 1.0
    """What the optimizer remembers, as a share of what `update` says."""

    @property
    def optimizer(self) -> int:
        """Bytes that the optimizer remembers on a single device."""
        return round(self.remembered * self.update.optimizer)


@dataclass(frozen=True)
class Sharing:
    """How many train together, and what they share out."""

    gpus: int = 1
    stage: int | None = None
    """ZeRO stage; None: without DeepSpeed."""
    offload: bool = False
    """Whether the machine's memory takes the optimizer, and under ZeRO-3 the weights too."""

    def __str__(self) -> str:
        if self.stage is None:
            return "alone" if self.gpus == 1 else "data parallel"
        return f"ZeRO {self.stage}{', offload' if self.offload else ''}"


@dataclass(frozen=True)
class GpuMemory:
    """Bytes that each GPU holds at the busiest moment of an update."""

    weights: int
    gradients: int
    optimizer: int
    """Also the float32 copy of the trained weights, under DeepSpeed."""
    activations: int
    """What backward needs, a chunk of logits, the optimizer's working memory."""
    buffers: int
    """What is on its way to or from other GPUs."""
    host: int = 0
    """Bytes of the machine's memory for each GPU."""

    @property
    def peak(self) -> int:
        """All of it on the GPU."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.buffers)
        return sum(parts)


def sharings_for(gpus: int) -> list[Sharing]:
    """The layouts worth considering on this number of GPUs."""
    offloaded = [Sharing(gpus, stage, offload=True) for stage in (2, 3)]
    if gpus == 1:
        return [Sharing(), *offloaded]
    return [Sharing(gpus), *(Sharing(gpus, stage) for stage in (1, 2, 3)), *offloaded]


def memory_per_gpu(job: Workload, layout: Sharing) -> GpuMemory:
    """The busiest moment on each GPU."""
    moments = _plain_moments(job, layout) if layout.stage is None else _zero_moments(job, layout)
    return max(moments, key=lambda moment: moment.peak)


def _plain_moments(job: Workload, layout: Sharing) -> Iterator[GpuMemory]:
    """Every GPU holds all; between several, DDP sends the gradients from buckets of their size."""
    update, counts = job.update, job.counts
    everything = FLOAT32 * counts.trained
    gradients, activations = update.busiest_compute(1.0)
    computing = GpuMemory(
        weights=update.weights - _saved_by_quantizing(job),
        gradients=gradients,
        optimizer=job.optimizer,
        activations=activations + _restored(job),
        buffers=everything if layout.gpus > 1 else 0,
    )
    yield computing
    yield replace(computing, gradients=everything, activations=update.updating)


def _zero_moments(job: Workload, layout: Sharing) -> Iterator[GpuMemory]:
    assert layout.stage is not None
    size, counts, parts = job.bytes_per_number, job.counts, layout.gpus
    gradient_parts = parts if layout.stage >= 2 else 1
    part = -(-counts.trained // parts)
    state = FLOAT32 * part + job.optimizer // parts
    weights, buffers = _weights_and_buffers(job, layout)
    share = size / FLOAT32 / gradient_parts
    gradients, activations = job.update.busiest_compute(share, copies=False)
    host = 0
    if layout.offload:
        # Gradients arrive there in float32.
        host = state + FLOAT32 * part + (size * counts.total // parts if layout.stage == 3 else 0)
        state = 0
    computing = GpuMemory(
        weights=weights,
        gradients=round(gradients * share),
        optimizer=state,
        activations=activations + _restored(job),
        buffers=buffers,
        host=host,
    )
    yield computing
    if not layout.offload:
        # The step works on the part that is its own, with its gradients in float32.
        working = FLOAT32 * part + job.update.updating // parts
        held = size * counts.trained // gradient_parts
        yield replace(computing, gradients=held, activations=working, buffers=0)


def _weights_and_buffers(job: Workload, layout: Sharing) -> tuple[int, int]:
    """Bytes of the weights that stay on a GPU, and of what is gathered or sent."""
    size, counts = job.bytes_per_number, job.counts
    sent = BUCKETS * job.bucket_numbers * size
    if layout.stage != 3:
        return size * counts.total - _saved_by_quantizing(job), sent
    gathered = size * min(counts.total, max(LIVE_NUMBERS, counts.largest))
    return 0 if layout.offload else -(-size * counts.total // layout.gpus), gathered + sent


def _saved_by_quantizing(job: Workload) -> int:
    if job.stored is None:
        return 0
    return round((job.bytes_per_number - job.stored) * job.counts.frozen_in_layers)


def _restored(job: Workload) -> int:
    """A quantized weight is multiplied with in the dtype of the computation, one at a time."""
    return 0 if job.stored is None else job.bytes_per_number * job.counts.largest_in_layers
