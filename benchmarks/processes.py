"""Run a function as several ranks on this machine, in forks where possible.

A fork is faster than a new process, which would spend most of its time on importing torch.
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
"""CUDA does not work in a fork once it has been initialised."""


def run_together(
    work: Callable[..., None], *arguments: Any, number: int, method: str = START_METHOD
) -> None:
    """Run `work(rank, *arguments)` in `number` processes that share a gloo process group.

    Raises the error of the first process that fails.
    """
    start_ranks(_run_in_process_group, work, arguments, number=number, method=method)


def start_ranks(
    work: Callable[..., None], *arguments: Any, number: int, method: str = START_METHOD
) -> None:
    """Run the same without a process group; the environment is that of torch's launcher.

    Each process has one thread, so that ranks do not compete for cores.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    torch.multiprocessing.start_processes(
        _run_rank, (work, arguments, number, port), nprocs=number, start_method=method
    )


def reset_distributed_state() -> None:
    """Reset what accelerate and transformers remember of the last distributed setup."""
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    AcceleratorState._reset_state()
    PartialState._reset_state()
    unset_hf_deepspeed_config()


def _run_rank(
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
    reset_distributed_state()
    work(rank, *arguments)


def _run_in_process_group(rank: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    distributed.init_process_group("gloo")
    try:
        work(rank, *arguments)
    finally:
        distributed.destroy_process_group()
