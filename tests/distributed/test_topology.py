"""Which machine this is, and where all machines meet."""

import os
import socket
from pathlib import Path

import pytest

from yrunner.distributed.topology import Topology, topology_of
from yrunner.errors import MissingError, RunError
from yrunner.recipe.schema.distributed import (
    DistributedSection,
    HostfileMachines,
    RendezvousMachines,
    SlurmMachines,
)


def section(**keys) -> DistributedSection:
    return DistributedSection(**keys)


@pytest.mark.parametrize(("num_devices", "processes"), [(0, 1), (1, 1), (8, 8)])
def test_auto_is_one_process_for_each_gpu_and_one_without(num_devices, processes):
    assert topology_of(section(processes="auto"), num_devices).processes == processes


def test_a_number_of_processes_needs_no_gpus():
    assert topology_of(section(processes=3), 0) == Topology(3, num_ranks=3)


def test_a_rendezvous_needs_nothing_else():
    machines = RendezvousMachines(kind="rendezvous", number=4, this=2, address="node0:29500")
    layout = topology_of(section(processes=8, machines=machines), 8)
    assert layout == Topology(8, 4, 2, "node0:29500", 32)


def hostfile(folder: Path, text: str, processes="auto") -> DistributedSection:
    file = folder / "hostfile"
    file.write_text(text)
    return section(processes=processes, machines=HostfileMachines(kind="hostfile", file=file))


def test_a_hostfile_finds_the_machine_by_this_machines_name(tmp_path):
    own = socket.gethostname()
    text = f"# two of them\nfirst slots=8\n\n{own} slots=4  # ours\n"
    assert topology_of(hostfile(tmp_path, text), 1) == Topology(4, 2, 1, "first:29500", 12)


def test_a_hostfile_may_name_machines_by_address(tmp_path):
    layout = topology_of(hostfile(tmp_path, "10.9.9.9 slots=2\n127.0.0.1 slots=2\n"), 1)
    assert (layout.machine, layout.num_ranks) == (1, 4)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_hostfile_with_a_byte_order_mark_names_its_first_machine(tmp_path, encoding):
    found = hostfile(tmp_path, "")
    found.machines.file.write_bytes("127.0.0.1 slots=2\r\nother slots=2\r\n".encode(encoding))
    assert topology_of(found, 1) == Topology(2, 2, 0, "127.0.0.1:29500", 4)


@pytest.mark.parametrize(
    ("text", "processes", "message"),
    [
        ("first slots=8\n", "auto", "does not list this machine"),
        ("first eight\n", "auto", r"hostfile:1: first eight. Write a name and slots"),
        ("127.0.0.1 slots=8\n", 2, "processes is 2, but .* gives 127.0.0.1 8 slots"),
    ],
)
def test_a_hostfile_that_does_not_fit_is_refused(tmp_path, text, processes, message):
    with pytest.raises(RunError, match=message):
        topology_of(hostfile(tmp_path, text, processes), 1)


SLURM = {"SLURM_NNODES": "3", "SLURM_NODEID": "2", "SLURM_JOB_NODELIST": "gpu[07-09]"}


def test_slurm_names_the_machines(tmp_path, monkeypatch):
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-09]" ] && echo gpu07 gpu08\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    layout = topology_of(section(processes=4, machines=SlurmMachines(kind="slurm")), 0)
    assert layout == Topology(4, 3, 2, "gpu07:29500", 12)


def test_without_slurm_a_sentence_says_so(monkeypatch):
    monkeypatch.delenv("SLURM_NNODES", raising=False)
    slurm = section(machines=SlurmMachines(kind="slurm"))
    with pytest.raises(RunError, match="not inside a SLURM job: SLURM_NNODES is not set"):
        topology_of(slurm, 0)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingError, match="scontrol could not list the machines"):
        topology_of(slurm, 0)
