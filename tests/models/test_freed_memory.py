"""What is freed goes back to the system, also beneath what is still in use."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from yrunner.models.local import give_back_freed_memory

if sys.argv[1] == "gives back":
    give_back_freed_memory()
bytearray(30 * 2**20)  # glibc learns from it to keep blocks of this size
held = [(bytearray(2**21), bytearray(2000)) for _ in range(50)]
held = [small for _, small in held]
print(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE"))
"""


def resident_bytes(way: str) -> int:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc keeps freed blocks")
def test_blocks_between_others_are_given_back():
    kept, given_back = resident_bytes("keeps"), resident_bytes("gives back")
    assert kept - given_back > 80e6
