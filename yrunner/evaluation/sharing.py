"""Several processes share the questions, each with the whole model; all get all the answers.

A launcher starts them, as in `torchrun --standalone --nproc-per-node 2 -m yrunner.cli eval RECIPE`,
and tells each its place. Without one, a process is alone and does all of the work.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import distributed

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def joined() -> Iterator[bool]:
    """Join the launcher's processes, if there is one; True for the one that prints and writes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    # accelerate joins no processes without GPUs unless it is told that there are none.
    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        yield state.is_main_process
    finally:
        state.destroy_process_group()


def is_first() -> bool:
    """True for the process that shows how far the work is."""
    return not _is_shared() or distributed.get_rank() == 0


def share_out(
    items: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]]
) -> list[Result]:
    """The result of every item, in order; each process works on every n-th of them.

    `work` gives one result for each item, which must not hang on the others.
    """
    if not _is_shared():
        return work(items)
    size = distributed.get_world_size()
    parts: list[Any] = [None] * size
    distributed.all_gather_object(parts, work(items[distributed.get_rank() :: size]))
    return [parts[number % size][number // size] for number in range(len(items))]


def _is_shared() -> bool:
    return distributed.is_available() and distributed.is_initialized()
