"""Several processes of this machine that know each other: forks where they can be.

Importing torch and its friends takes a new process for longer than most of its work here.
"""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import distributed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

START_METHOD = "spawn" if torch.cuda.is_available() else "fork"
"""A GPU that was looked at cannot be used in a fork."""


def run_together(
    work: Callable[..., None], *arguments: Any, number: int, method: str = START_METHOD
) -> None:
    """Run `work(rank, *arguments)` in so many processes that have met over gloo.

    Raises what the first of them to fail raises.
    """
    start_ranks(_meet, work, arguments, number=number, method=method)


def start_ranks(
    work: Callable[..., None], *arguments: Any, number: int, method: str = START_METHOD
) -> None:
    """The same in processes that have not met: they know what torch's launcher would tell them.

    Each has one thread, so that as many as there are cores do not wait for each other.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    torch.multiprocessing.start_processes(
        _be_rank, (work, arguments, number, port), nprocs=number, start_method=method
    )


def forget_sharing() -> None:
    """Let this process share in another way: accelerate and transformers keep the first one."""
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    AcceleratorState._reset_state()
    PartialState._reset_state()
    unset_hf_deepspeed_config()


def _be_rank(
    rank: int, work: Callable[..., None], arguments: tuple[Any, ...], number: int, port: int
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    forget_sharing()
    work(rank, *arguments)


def _meet(rank: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    distributed.init_process_group("gloo")
    try:
        work(rank, *arguments)
    finally:
        distributed.destroy_process_group()
