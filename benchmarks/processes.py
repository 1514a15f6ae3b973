"""Processes that begin as forks where they can, as importing torch and its friends takes long."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

START_METHOD = "spawn" if torch.cuda.is_available() else "fork"
"""A GPU that was looked at cannot be used in a fork."""


def start_ranks(work: Callable[..., None], arguments: tuple[Any, ...], number: int) -> None:
    """Run `work(rank, *arguments)` in so many processes; raises what one of them raises.

    They get from their environment what torch's launcher would tell them, and have not met yet.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    torch.multiprocessing.start_processes(
        _be_rank, (work, arguments, number, port), nprocs=number, start_method=START_METHOD
    )


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


def forget_sharing() -> None:
    """accelerate and transformers keep one way of sharing for the life of a process."""
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    AcceleratorState._reset_state()
    PartialState._reset_state()
    unset_hf_deepspeed_config()
