"""Collective operations over the ranks of a run.

Without a launcher there is one rank, 0, and every function returns its input.
"""

import os
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, distributed


def join_ranks(*, deepspeed: bool = False) -> None:
    """Initialize the process group; waits for all ranks."""
    if deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if torch.cuda.is_available():
        PartialState()
    elif deepspeed:
        # Without GPUs accelerate cannot choose the backend.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _skip_shared_memory()
        PartialState(backend="gloo")
    else:
        PartialState(cpu=True)


def is_joined() -> bool:
    """Whether the process group is initialized."""
    return distributed.is_available() and distributed.is_initialized()


def this_rank() -> int:
    """Rank of this process, from 0."""
    return distributed.get_rank() if is_joined() else 0


def num_ranks() -> int:
    """World size."""
    return distributed.get_world_size() if is_joined() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on every rank."""
    if num_ranks() == 1:
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def max_over_ranks(number: float) -> float:
    """The maximum of a number over all ranks, on every rank."""
    if num_ranks() == 1:
        return number
    highest = torch.tensor(float(number), dtype=torch.float64, device=_device())
    distributed.all_reduce(highest, op=distributed.ReduceOp.MAX)
    return float(highest)


def min_max_over_ranks(least: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum of the first tensor and maximum of the second over all ranks, on every rank."""
    if num_ranks() == 1:
        return least, highest
    both = torch.stack([-least, highest])
    distributed.all_reduce(both, op=distributed.ReduceOp.MAX)
    return -both[0], both[1]


def gather_over_ranks(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank. Any picklable object."""
    values: list[Any] = [value]
    if num_ranks() > 1:
        values = [None] * num_ranks()
        distributed.all_gather_object(values, value)
    return values


def wait_for_ranks() -> None:
    """Barrier: wait until every rank gets here."""
    if num_ranks() > 1:
        distributed.barrier()


def leave_ranks(*, together: bool = False) -> None:
    """Destroy the process group. `together`: wait for all ranks first; not after a failure."""
    if is_joined():
        if together:
            wait_for_ranks()
        PartialState().destroy_process_group()


def _device() -> str:
    """Device of the tensors that the backend reduces: NCCL needs the GPU, gloo the CPU."""
    return "cuda" if "nccl" in distributed.get_backend() else "cpu"


def _skip_shared_memory() -> None:
    """Skip DeepSpeed's shared-memory backend: it compiles for a minute and gains little."""
    import deepspeed

    # A table of our own: to fill its own, DeepSpeed links test programs, whose failures
    # ("collect2: error: ld returned 1") it lets through, and this operation is all it looks up.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
