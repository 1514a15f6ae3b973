"""The machine that a run is planned for: this one, or one that somebody thinks of renting."""

import re
from dataclasses import dataclass, replace

import psutil
import torch

from yrunner.errors import YRunnerError
from yrunner.machines import lay_out
from yrunner.models.container import container_memory
from yrunner.recipe.schema_distributed import DistributedSection

UNITS = {"": 1e9, "M": 1e6, "MB": 1e6, "MIB": 2**20, "G": 1e9, "GB": 1e9, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Z]*)")
CONTEXT = 5 * 10**8
"""Bytes of a GPU that CUDA takes for itself, about."""
IN_USE = 0.95
"""Share of a GPU's memory that the allocator can give out before fragments are in its way."""


@dataclass(frozen=True)
class Machine:
    """How many devices train together, and what each of them can hold."""

    gpus: int
    memory: int
    """Bytes of each."""
    is_cpu: bool = False
    host: int | None = None
    """Bytes of the machine's own memory, where they are known."""

    @property
    def room(self) -> int:
        """Bytes that training may take on each device."""
        return self.memory if self.is_cpu else round(IN_USE * self.memory) - CONTEXT

    def __str__(self) -> str:
        size = f"{self.memory / 1e9:.4g} GB"
        if self.is_cpu:
            return f"this machine without a GPU, {size}"
        return f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} of {size}"


def choose_machine(gpus: int | None, memory: str | None, processes: int = 1) -> Machine:
    """The machine with so many GPUs of so much memory; what is not given is that of this one.

    A recipe with several `processes` takes a GPU for each. Raises `YRunnerError` where the memory
    is no size, or is not given and there is no GPU here.
    """
    here = this_machine()
    if gpus is not None and memory is None and here.is_cpu:
        raise YRunnerError(
            f"--gpus {gpus} says nothing of their memory, and this machine has none to look at",
            remedy=f"add it: --gpus {gpus} --memory 80GB",
        )
    number = gpus or (processes if processes > 1 else here.gpus)
    if memory is not None:
        return Machine(number, as_bytes(memory))
    if here.is_cpu:
        # All processes share the one memory.
        return replace(here, gpus=number, memory=here.memory // number)
    return here if number == here.gpus else Machine(number, here.memory)


def count_ranks(distributed: DistributedSection, gpus: int | None) -> int:
    """Processes of a run on this machine, or on one with so many GPUs."""
    return lay_out(distributed, gpus or torch.cuda.device_count()).num_ranks


def this_machine() -> Machine:
    """The GPUs of this machine, the smallest for all, or its CPU."""
    container = container_memory()
    host = psutil.virtual_memory().total if container is None else container.limit
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        return Machine(1, host, is_cpu=True)
    memory = min(torch.cuda.mem_get_info(number)[1] for number in range(num_gpus))
    return Machine(num_gpus, memory, host=host)


def as_bytes(text: str) -> int:
    """`80GB`, `80`, `79.6 GiB` as bytes. Raises `YRunnerError` for anything else."""
    match = _SIZE.fullmatch(text.strip().upper())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise YRunnerError(f'"{text}" is no size of a memory', remedy="write it like 80GB")
    return round(float(match[1]) * UNITS[match[2]])
