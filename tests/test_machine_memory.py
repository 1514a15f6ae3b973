"""Memory of this machine, within the limit of a container."""

import subprocess
import sys
from pathlib import Path

import pytest

from yrunner import machine
from yrunner.machine import CgroupMemory, cgroup_memory, free_memory


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    return tmp_path


def write_version_2(folder: Path, limit: str) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text("900\n")
    (folder / "memory.stat").write_text("anon 300\ninactive_file 600\n")


def write_version_1(folder: Path, limit: str) -> None:
    (folder / "memory").mkdir()
    (folder / "memory/memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory/memory.usage_in_bytes").write_text("900\n")
    (folder / "memory/memory.stat").write_text("inactive_file 1\ntotal_inactive_file 600\n")


@pytest.mark.parametrize("write", [write_version_1, write_version_2])
def test_cached_pages_of_files_count_as_free(groups: Path, write) -> None:
    write(groups, "1000")
    assert cgroup_memory() == CgroupMemory(limit=1000, used=300)
    assert cgroup_memory().free == 700


def test_without_a_cgroup_or_a_limit_there_is_none(groups: Path) -> None:
    assert cgroup_memory() is None
    write_version_2(groups, "max")
    assert cgroup_memory() is None
    write_version_1(groups, str(2**63 - 4096))
    assert cgroup_memory() is None


def test_free_memory_is_within_the_limit_of_a_container(groups: Path) -> None:
    assert free_memory() > 1000
    write_version_2(groups, "max")
    assert free_memory() > 1000
    write_version_2(groups, "1000")
    assert free_memory() == 700


PROGRAM = """
import os, sys
from yrunner.machine import lower_mmap_threshold

if sys.argv[1] == "returns":
    lower_mmap_threshold()
bytearray(30 * 2**20)  # after this glibc retains blocks of this size
blocks = [(bytearray(2**21), bytearray(2**18)) for _ in range(50)]
small = [block for _, block in blocks]; del blocks
print(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE"))
"""


def resident_bytes(way: str) -> int:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc retains freed blocks")
def test_freed_blocks_between_others_return_to_the_system():
    retained, returned = resident_bytes("retains"), resident_bytes("returns")
    assert retained - returned > 80e6
