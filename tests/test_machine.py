"""Memory within the limit of a container, and cores that several programs share."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from yrunner import machine
from yrunner.machine import (
    CgroupMemory,
    SharedProcessor,
    cgroup_memory,
    free_memory,
    look_around,
    peak_memory,
    return_freed_memory,
    used_by_all,
)

MB = 10**6
is_glibc = platform.libc_ver()[0] == "glibc"


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


class Torch:
    """Counts threads as torch does; has no GPU."""

    cuda = SimpleNamespace(is_available=lambda: False)

    def __init__(self, threads):
        self.threads = threads

    def get_num_threads(self):
        return self.threads

    def set_num_threads(self, number):
        self.threads = number


class Machine:
    """Cores, of which others use some; time passes when a test says so."""

    def __init__(self, cores, threads):
        self.time = self.others = self.own = 0.0
        self.torch = Torch(threads)
        used = lambda: self.others + self.own  # noqa: E731
        self.shared = SharedProcessor(used, lambda: self.own, lambda: self.time, cores)
        self.shared.look(self.torch)

    def threads_after(self, *, others, seconds=3.0, own=1.0):
        """`others`, `own`: cores in use."""
        self.time += seconds
        self.others += others * seconds
        self.own += own * seconds
        self.shared.look(self.torch)
        return self.torch.threads


@pytest.mark.parametrize(
    ("cores", "others", "expected"),
    [
        (2, 0.0, 2),
        (2, 0.3, 2),
        (2, 1.0, 1),
        (2, 2.0, 1),
        (16, 8.0, 8),
        (16, 15.9, 1),
        (16, 0.4, 16),
    ],
)
def test_there_is_a_thread_for_each_core_that_others_leave_free(cores, others, expected):
    assert Machine(cores, cores).threads_after(others=others) == expected


def test_a_program_alone_keeps_its_threads_however_much_it_uses():
    machine = Machine(cores=2, threads=2)
    assert [machine.threads_after(others=0, own=own) for own in (2.0, 0.1, 1.0)] == [2, 2, 2]


def test_threads_come_back_when_two_looks_agree_that_cores_are_free():
    machine = Machine(cores=2, threads=2)
    loads = [1.0, 0.0, 1.0, 0.0, 0.0]
    assert [machine.threads_after(others=load) for load in loads] == [1, 1, 1, 1, 2]


def test_there_are_never_more_threads_than_at_the_start():
    machine = Machine(cores=16, threads=4)
    assert [machine.threads_after(others=0) for _ in range(3)] == [4, 4, 4]
    assert machine.threads_after(others=13.6) == 2


def test_two_programs_that_share_the_cores_settle_at_half_of_them():
    ours, theirs = Machine(16, 16), Machine(16, 16)
    for _ in range(6):
        # Each gets cores in proportion to its threads.
        a, b = ours.torch.threads, theirs.torch.threads
        share = min(1.0, 16 / (a + b))
        ours.threads_after(others=b * share, own=a * share)
        theirs.threads_after(others=a * share, own=b * share)
    assert ours.torch.threads + theirs.torch.threads == 16


def test_a_look_soon_after_another_reads_nothing():
    machine = Machine(cores=2, threads=2)
    assert machine.threads_after(others=2.0, seconds=1.0) == 2
    assert machine.threads_after(others=2.0, seconds=1.5) == 1, "since the last that counted"


def test_only_our_cores_count_and_waiting_is_not_use(tmp_path):
    statistics = tmp_path / "stat"
    statistics.write_text(
        "cpu  9999 9999 9999 9999 9999 9999 9999 9999 0 0\n"
        "cpu0 100 10 20 5000 300 1 2 4 77 0\n"
        "cpu1 200 0 0 5000 0 0 0 0 0 0\n"
        "cpu10 1 0 0 0 0 0 0 0 0 0\n"
        "intr 12345\n"
    )
    ticks = os.sysconf("SC_CLK_TCK")
    assert used_by_all(frozenset({0}), statistics) == (100 + 10 + 20 + 1 + 2 + 4) / ticks
    assert used_by_all(frozenset({0, 1}), statistics) == (137 + 200) / ticks


@pytest.mark.skipif(not machine.STATISTICS.exists(), reason="this system has no /proc/stat")
def test_the_time_of_a_busy_program_is_seen_by_others():
    cores = frozenset(os.sched_getaffinity(0))
    before = used_by_all(cores)
    subprocess.run([sys.executable, "-c", "for _ in range(10**7): pass"], check=True)
    assert used_by_all(cores) > before


@pytest.mark.parametrize("name", machine.SETTINGS)
def test_what_the_user_has_set_stays(name, monkeypatch):
    for each in machine.SETTINGS:
        monkeypatch.delenv(each, raising=False)
    decide = machine._this_processor.__wrapped__
    assert decide() is not None
    monkeypatch.setenv(name, "2")
    assert decide() is None


def test_training_scoring_and_writing_look_around(trained_base, monkeypatch):
    from yrunner.commands.train import train

    seen = []

    class Seen:
        def look(self, _torch):
            frame, callers = sys._getframe(2), set()
            while frame is not None:
                callers.add(frame.f_code.co_name)
                frame = frame.f_back
            seen.append(callers)

    monkeypatch.setattr(machine, "_this_processor", Seen)
    train(Path("tuned.yaml"), [], resume=False, overwrite=False)
    for caller in ("_score_batch", "write", "train_to_the_end"):
        assert any(caller in callers for callers in seen), caller


def test_nothing_happens_before_torch_is_loaded(monkeypatch):
    shared = SharedProcessor(float, float, float, 2)
    monkeypatch.setattr(machine, "_this_processor", lambda: shared)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    look_around()


def resident() -> int:
    return psutil.Process().memory_info().rss


def test_the_peak_is_at_least_what_is_resident_now_and_stays(monkeypatch):
    block = bytearray(b"x") * (50 * MB)
    with_it = resident()
    del block
    assert peak_memory() >= with_it - MB
    monkeypatch.setattr(machine, "STATUS", Path("nowhere"))
    assert peak_memory() == pytest.approx(resident(), abs=10 * MB)


@pytest.mark.skipif(not is_glibc, reason="other C libraries keep what they keep")
def test_gaps_between_blocks_that_are_kept_are_returned():
    blocks = [bytearray(b"x") * 100_000 for _ in range(2000)]  # smaller ones than glibc maps
    kept = blocks[::100]
    before = resident()
    del blocks
    return_freed_memory()
    assert before - resident() > 150 * MB
    assert all(block == b"x" * 100_000 for block in kept)


def test_a_training_returns_freed_memory_around_it_and_when_gaps_add_up(monkeypatch):
    from yrunner.training import callbacks

    held, seen, returned = [100, 104, 106, 90, 104, 120, 110, 113, 116], [], []
    monkeypatch.setattr(callbacks, "return_freed_memory", lambda: returned.append(len(seen)))
    monkeypatch.setattr(callbacks, "resident_memory", lambda: seen[-1])
    keeper = callbacks.ReturnFreedMemory()
    keeper.on_train_begin()
    for memory in held:
        seen.append(memory)
        keeper.on_step_end()
    keeper.on_train_end()
    # 106 and 120 are more than 1.05 of 100; 116 is more than 1.05 of 110, that of update 7.
    assert returned == [0, 3, 6, 9, 9]


@pytest.mark.usefixtures("trained_base")
def test_every_training_on_a_cpu_returns_freed_memory(monkeypatch):
    from yrunner.assembly import trainer
    from yrunner.commands.train import train

    seen = []

    class Seen(trainer.ReturnFreedMemory):
        def on_step_end(self, *arguments, **more):
            super().on_step_end(*arguments, **more)
            seen.append(1)

    monkeypatch.setattr(trainer, "ReturnFreedMemory", Seen)
    train(Path("tuned.yaml"), ["train.max_steps=3"], resume=False, overwrite=True)
    assert len(seen) == 3


def test_products_of_many_lengths_are_not_all_kept():
    program = (
        "import psutil; from yrunner.machine import limit_kept_kernels; limit_kept_kernels()\n"
        "import torch\n"
        "def compute(length):\n"
        "    rows = torch.ones(length, 256, dtype=torch.bfloat16)\n"
        "    for width in range(64, 192, 16):\n"
        "        weight = torch.ones(256, width, dtype=torch.bfloat16)\n"
        "        (rows @ weight) @ weight.T\n"
        "compute(32); before = psutil.Process().memory_info().rss\n"
        "for length in range(33, 65): compute(length)\n"
        "print(psutil.Process().memory_info().rss - before)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert int(result.stdout) < 50 * MB, "with torch's defaults 200 MB, where oneDNN computes"


@pytest.mark.parametrize("name", machine.KEPT_KERNELS)
def test_a_number_of_kernels_that_the_user_has_set_stays(name, monkeypatch):
    for each in machine.KEPT_KERNELS:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "500")
    machine.limit_kept_kernels()
    assert os.environ[name] == "500"
    assert set(machine.KEPT_KERNELS) <= os.environ.keys()
    for each in machine.KEPT_KERNELS:
        monkeypatch.delenv(each)
