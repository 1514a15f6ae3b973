"""Fill the disk, make it read-only or deny access while a command writes."""

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.faults.cases import Case, judge, unexplained
from benchmarks.faults.child import run
from benchmarks.faults.stages import Workshop, differences, hashes_below, size_on_disk

AMPLE_BYTES = 64 * 2**20
NOBODY = 65534
READ_MODELS = ("outputs/base/model", "outputs/writer/model")


def can_mount() -> bool:
    """Return whether this process may mount a file system."""
    command = ["unshare", "--mount", "true"]
    return os.geteuid() == 0 and subprocess.run(command, check=False).returncode == 0


def full_disk_cases(workshop: Workshop, num_cases: int, generator: random.Random) -> Iterator[Case]:
    """Run out of space at a random write of each command in turn, then free enough space."""
    for count in range(num_cases):
        stage = workshop.stages[count % len(workshop.stages)]
        size_after = workshop.reference(stage).size
        workshop.set_up(stage)
        outputs = workshop.project / "outputs"
        with _temporary_file_system(outputs):
            used = _used(outputs)
            limit = used + generator.randint(0, max(1, size_after - size_on_disk(outputs)))
            _resize(outputs, limit)
            before = hashes_below(outputs)
            ending = run(stage.command, workshop.project)
            wrong = unexplained(ending)
            wrong += [f"{path} has disappeared" for path in before if not Path(path).exists()]
            _resize(outputs, AMPLE_BYTES)
            fault = f"{limit - used:,} bytes free, exit code {ending.code}"
            yield judge(workshop, stage, "disk full", fault, wrong)


def read_only_cases(workshop: Workshop, num_cases: int) -> Iterator[Case]:
    """Expect a message and no change on a read-only disk."""
    for stage in workshop.stages[:num_cases]:
        workshop.reference(stage)
        workshop.set_up(stage)
        outputs = workshop.project / "outputs"
        with _temporary_file_system(outputs):
            before = hashes_below(outputs)
            _mount("remount,ro", outputs)
            ending = run(stage.command, workshop.project)
            wrong = _refused(ending.code) + unexplained(ending)
            wrong += differences(before, hashes_below(outputs))
            _mount("remount,rw", outputs)
            yield judge(workshop, stage, "read-only", "from the start", wrong)


def permission_cases(workshop: Workshop, num_cases: int) -> Iterator[Case]:
    """Expect a message if the output folder or an input belongs to another user."""
    for stage in workshop.stages[:num_cases]:
        workshop.reference(stage)
        workshop.set_up(stage)
        models = [path for path in READ_MODELS if (workshop.project / path).exists()]
        for name in ("outputs", stage.data, *models):
            workshop.set_up(stage)
            path = workshop.project / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=True) if name == "outputs" else path.chmod(0)
            ending = run(stage.command, workshop.project, prepare=_become_nobody)
            needs_it = name == "outputs" or ending.code != 0
            wrong = (_refused(ending.code) if needs_it else []) + unexplained(ending)
            path.chmod(0o755)
            yield judge(workshop, stage, "no permission", name, wrong)


def _become_nobody() -> None:
    """Drop root, which may access everything."""
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _refused(code: int | None) -> list[str]:
    return [] if code == 2 else [f"exit code {code} instead of 2"]


@contextmanager
def _temporary_file_system(folder: Path) -> Iterator[None]:
    """Move the content of a folder to a temporary file system in memory."""
    copy = folder.with_name(f"{folder.name}.copy")
    folder.mkdir(exist_ok=True)
    shutil.copytree(folder, copy)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={AMPLE_BYTES}", "tmpfs", folder], check=True
    )
    try:
        shutil.copytree(copy, folder, dirs_exist_ok=True)
        shutil.rmtree(copy)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def _resize(folder: Path, size: int) -> None:
    _mount(f"remount,size={size}", folder)


def _mount(options: str, folder: Path) -> None:
    subprocess.run(["mount", "-o", options, folder], check=True)


def _used(folder: Path) -> int:
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize
