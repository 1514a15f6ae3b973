"""Divide the questions among processes that each hold the whole model; all get all answers.

A launcher starts them: `torchrun --standalone --nproc-per-node 2 -m yrunner.cli eval RECIPE`.
Without one, a single process does all the work.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from transformers.integrations import is_deepspeed_zero3_enabled

from yrunner.distributed.collectives import (
    gather_over_ranks,
    is_joined,
    join_ranks,
    leave_ranks,
    num_ranks,
    this_rank,
)

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def joined() -> Iterator[bool]:
    """Join the launcher's processes, if any; True for the one that prints and writes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    join_ranks()
    try:
        yield this_rank() == 0
    finally:
        leave_ranks()


def is_first() -> bool:
    """True for the process that shows progress."""
    return this_rank() == 0


def share_out(
    items: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]]
) -> list[Result]:
    """The result of every item, in order; of n processes, each works on every n-th item.

    `work` gives one result per item, independent of the others. Under ZeRO-3 every process works on
    all items: the weights are sharded, so all processes must run each layer together.
    """
    if not is_joined() or is_deepspeed_zero3_enabled():
        return work(items)
    size = num_ranks()
    parts = gather_over_ranks(work(items[this_rank() :: size]))
    return [parts[number % size][number // size] for number in range(len(items))]
