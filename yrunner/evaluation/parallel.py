"""Several processes share the questions, each with the whole model; all get all the answers.

A launcher starts them, as in `torchrun --standalone --nproc-per-node 2 -m yrunner.cli eval RECIPE`,
and tells each its place. Without one, a process is alone and does all of the work.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from transformers.integrations import is_deepspeed_zero3_enabled

from yrunner.distributed.collectives import (
    from_all_ranks,
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
    """Join the launcher's processes, if there is one; True for the one that prints and writes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    join_ranks()
    try:
        yield this_rank() == 0
    finally:
        leave_ranks()


def is_first() -> bool:
    """True for the process that shows how far the work is."""
    return this_rank() == 0


def share_out(
    items: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]]
) -> list[Result]:
    """The result of every item, in order; each process works on every n-th of them.

    `work` gives one result for each item, which must not hang on the others. Under ZeRO-3 every
    process works on all items: no one has the weights, and all have to run each layer together.
    """
    if not is_joined() or is_deepspeed_zero3_enabled():
        return work(items)
    size = num_ranks()
    parts = from_all_ranks(work(items[this_rank() :: size]))
    return [parts[number % size][number // size] for number in range(len(items))]
