"""Run a function in several new processes of this machine, which know each other over gloo."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed


def run_together(work: Callable[..., None], *arguments: Any, number: int) -> None:
    """Run `work(rank, *arguments)` in `number` processes; raises what the first to fail raises.

    Each has one thread, so that as many as there are cores do not wait for each other.
    """
    where = (work, arguments, number, _free_port())
    torch.multiprocessing.spawn(_join, where, nprocs=number)


def _free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
        return port


def _join(
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
    distributed.init_process_group("gloo")
    try:
        work(rank, *arguments)
    finally:
        distributed.destroy_process_group()
