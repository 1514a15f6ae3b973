"""Bytes that each GPU sends to others for one update.

A ring passes every part of S bytes on between R GPUs: each sends (R - 1) / R of S to gather or to
scatter, and twice that to sum what all then hold (Patarasuk and Yuan, 2009,
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
        """All of them."""
        return self.gradients + self.weights


def traffic_per_gpu(job: Workload, layout: Sharing, *, micro_steps: int = 1) -> Traffic:
    """What is sent for one update of `micro_steps` micro-batches on each GPU.

    Data parallel and ZeRO 1 sum the gradients once, ZeRO 2 and 3 after every micro-batch. DeepSpeed
    sums them whole under 1 and 2 (`use_multi_rank_bucket_allreduce`) and then gathers the new
    weights; 3 scatters the sums, and gathers all weights for every forward pass and, unless they
    all stay (`stage3_max_live_parameters`), for every backward pass.
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
