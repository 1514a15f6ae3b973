"""Bytes that each GPU sends for one update.

With ring algorithms on R GPUs, each sends (R - 1) / R of S bytes for an all-gather or a
reduce-scatter, and twice that for an all-reduce (Patarasuk and Yuan, 2009,
https://doi.org/10.1016/j.jpdc.2008.09.002).
"""

from dataclasses import dataclass

from yrunner.training.memory.zero import FLOAT32, LIVE_NUMBERS, Sharing, Workload


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends for one update."""

    gradients: int
    weights: int

    @property
    def total(self) -> int:
        """Sum of both."""
        return self.gradients + self.weights


def traffic_per_gpu(job: Workload, layout: Sharing, *, micro_steps: int = 1) -> Traffic:
    """Return what each GPU sends for one update of `micro_steps` micro-batches.

    DDP and ZeRO 1 reduce gradients once, ZeRO 2 and 3 after every micro-batch. In stages 1 and 2
    DeepSpeed all-reduces them (`use_multi_rank_bucket_allreduce`) and then gathers the new weights.
    In stage 3 it reduce-scatters them, and gathers all weights for every forward pass and, unless
    they all stay in memory (`stage3_max_live_parameters`), for every backward pass.
    """
    ring = (layout.gpus - 1) / layout.gpus
    trained = job.counts.trained
    own = job.bytes_per_number * trained
    match layout.stage:
        case None:
            gradients, weights = 2 * FLOAT32 * trained, 0
        case 1:
            gradients, weights = 2 * own, own
        case 2:
            gradients, weights = 2 * own * micro_steps, own
        case _:
            passes = 1 if job.counts.total <= LIVE_NUMBERS else 2
            gradients = own * micro_steps
            weights = passes * job.bytes_per_number * job.counts.total * micro_steps
    return Traffic(round(ring * gradients), round(ring * weights))
