"""This process among those that train together: which one it is, and what all of them sum up.

Alone, it is rank 0 of one, and every function gives back what it was given.
"""

import os
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, distributed


def join_ranks(*, deepspeed: bool = False) -> None:
    """Meet the other processes that torch's launcher has started; each waits for all others."""
    if deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if torch.cuda.is_available():
        PartialState()
    elif deepspeed:
        # Without GPUs accelerate would not know which back end it is to be.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _leave_shared_memory_alone()
        PartialState(backend="gloo")
    else:
        PartialState(cpu=True)


def is_joined() -> bool:
    """Whether this process has met others, or itself, through a launcher."""
    return distributed.is_available() and distributed.is_initialized()


def this_rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if is_joined() else 0


def num_ranks() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if is_joined() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of this tensor over all processes, in each of them."""
    if num_ranks() == 1:
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def highest_of_ranks(number: float) -> float:
    """The highest of the numbers of all processes, in each of them."""
    if num_ranks() == 1:
        return number
    highest = torch.tensor(float(number), dtype=torch.float64, device=_device())
    distributed.all_reduce(highest, op=distributed.ReduceOp.MAX)
    return float(highest)


def least_and_highest(least: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
    """The least of the first tensor and the highest of the second over all processes."""
    if num_ranks() == 1:
        return least, highest
    both = torch.stack([-least, highest])
    distributed.all_reduce(both, op=distributed.ReduceOp.MAX)
    return -both[0], both[1]


def from_all_ranks(value: Any) -> list[Any]:
    """The values of all processes, by rank, in each of them. Any object that can be pickled."""
    values: list[Any] = [value]
    if num_ranks() > 1:
        values = [None] * num_ranks()
        distributed.all_gather_object(values, value)
    return values


def wait_for_ranks() -> None:
    """Go on when every process has come this far."""
    if num_ranks() > 1:
        distributed.barrier()


def leave_ranks(*, together: bool = False) -> None:
    """Part from the other processes. `together`: when all are done, as one that failed is never."""
    if is_joined():
        if together:
            wait_for_ranks()
        PartialState().destroy_process_group()


def _device() -> str:
    """Where NCCL can reach a number; gloo reaches the processor's memory."""
    return "cuda" if "nccl" in distributed.get_backend() else "cpu"


def _leave_shared_memory_alone() -> None:
    """DeepSpeed would compile its own way between processors for a minute, to be a bit faster."""
    import deepspeed

    # A table of our own: to fill its own, DeepSpeed links test programs, whose failures
    # ("collect2: error: ld returned 1") it lets through, and this operation is all it looks up.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
