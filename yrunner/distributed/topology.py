"""The machines of a run, and which one this is."""

import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from yrunner.errors import MissingError, RunError
from yrunner.recipe.schema.distributed import (
    DistributedSection,
    HostfileMachines,
    RendezvousMachines,
    SlurmMachines,
)
from yrunner.text_files import read_text


@dataclass(frozen=True)
class Topology:
    """The machines of a run, as seen from this one."""

    processes: int
    """Processes on this machine."""
    num_machines: int = 1
    machine: int = 0
    """Index of this machine, from 0."""
    address: str | None = None
    """Host and port where all machines meet; None for a single machine."""
    num_ranks: int = 0
    """World size: processes on all machines."""


def topology_of(section: DistributedSection, num_devices: int) -> Topology:
    """Machines and processes of a run. `num_devices`: number of GPUs of this machine.

    Raises `RunError` if this machine is not part of the run.
    """
    per_machine = max(1, num_devices) if section.processes == "auto" else section.processes
    match section.machines:
        case None:
            return Topology(per_machine, num_ranks=per_machine)
        case RendezvousMachines(number=number, this=this, address=address):
            return Topology(per_machine, number, this, address, number * per_machine)
        case HostfileMachines(file=file, port=port):
            return _from_hostfile(section, file, port)
        case SlurmMachines(port=port):
            return _from_slurm(per_machine, port)


def _from_hostfile(section: DistributedSection, file: Path, port: int) -> Topology:
    """The machines of a DeepSpeed hostfile; this one is found by its name or address."""
    slots: dict[str, int] = {}
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not words[1].removeprefix("slots=").isdigit():
            raise RunError(
                f"{file}:{number}: {line.strip()}", remedy="write a name and slots: node0 slots=8"
            )
        slots[words[0]] = int(words[1].removeprefix("slots="))
    own = {socket.gethostname(), socket.getfqdn(), *_addresses()}
    here = [name for name in slots if name in own]
    if not here:
        raise RunError(
            f"{file} does not list this machine, {socket.gethostname()}",
            remedy="add a line with its name, or run the command on a listed machine",
        )
    processes = slots[here[0]]
    if section.processes not in ("auto", processes):
        raise RunError(
            f"distributed.processes is {section.processes}, but {file} gives {here[0]} "
            f"{processes} slots",
            remedy="set distributed.processes to auto to use the slots",
        )
    first = f"{next(iter(slots))}:{port}"
    return Topology(processes, len(slots), list(slots).index(here[0]), first, sum(slots.values()))


def _addresses() -> list[str]:
    return [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    ]


def _from_slurm(processes: int, port: int) -> Topology:
    """The machines of the SLURM job that this process belongs to."""
    try:
        number = int(os.environ["SLURM_NNODES"])
        machine = int(os.environ["SLURM_NODEID"])
        names = os.environ["SLURM_JOB_NODELIST"]
    except KeyError as error:
        raise RunError(
            f"not inside a SLURM job: {error.args[0]} is not set",
            remedy="start the command with srun, once per machine",
        ) from error
    # The list is abbreviated (node[01-04]); only SLURM can expand every form of it.
    command = ["scontrol", "show", "hostnames", names]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise MissingError(
            f"scontrol could not list the machines of {names}",
            remedy="use distributed.machines of kind rendezvous",
        ) from error
    first = found.stdout.split()[0]
    return Topology(processes, number, machine, f"{first}:{port}", number * processes)
