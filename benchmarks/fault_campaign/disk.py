"""A file system that is full, read-only or closed to us, while each kind of work writes to it."""

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.fault_campaign.cases import Case, judge, unexplained
from benchmarks.fault_campaign.child import run
from benchmarks.fault_campaign.stages import Workshop, differences, hashes_below, size_on_disk

ROOM_FOR_ALL = 64 * 2**20
NOBODY = 65534
READ_MODELS = ("outputs/base/model", "outputs/speaker/model")


def can_mount() -> bool:
    """Whether this process may mount a file system of its own."""
    command = ["unshare", "--mount", "true"]
    return os.geteuid() == 0 and subprocess.run(command, check=False).returncode == 0


def full_disk_cases(workshop: Workshop, number: int, chance: random.Random) -> Iterator[Case]:
    """The space ends at a random write of each kind of work in turn; later there is enough."""
    for count in range(number):
        stage = workshop.stages[count % len(workshop.stages)]
        size_after = workshop.reference(stage).size
        workshop.set_up(stage)
        outputs = workshop.project / "outputs"
        with _own_file_system(outputs):
            used = _used(outputs)
            room = used + chance.randint(0, max(1, size_after - size_on_disk(outputs)))
            _resize(outputs, room)
            before = hashes_below(outputs)
            ending = run(stage.command, workshop.project)
            wrong = unexplained(ending)
            wrong += [f"{path} is gone" for path in before if not Path(path).exists()]
            _resize(outputs, ROOM_FOR_ALL)
            fault = f"{room - used:,} bytes free, exit code {ending.code}"
            yield judge(workshop, stage, "disk full", fault, wrong)


def read_only_cases(workshop: Workshop, number: int) -> Iterator[Case]:
    """Nothing can be written from the start: a sentence, and nothing has changed."""
    for stage in workshop.stages[:number]:
        workshop.reference(stage)
        workshop.set_up(stage)
        outputs = workshop.project / "outputs"
        with _own_file_system(outputs):
            before = hashes_below(outputs)
            _mount("remount,ro", outputs)
            ending = run(stage.command, workshop.project)
            wrong = _refused(ending.code) + unexplained(ending)
            wrong += differences(before, hashes_below(outputs))
            _mount("remount,rw", outputs)
            yield judge(workshop, stage, "read-only", "from the start", wrong)


def permission_cases(workshop: Workshop, number: int) -> Iterator[Case]:
    """Another user owns the folder, or a file that is read may not be."""
    for stage in workshop.stages[:number]:
        workshop.reference(stage)
        workshop.set_up(stage)
        models = [path for path in READ_MODELS if (workshop.project / path).exists()]
        closed = [stage.data, *models]
        for place in ("outputs", *closed):
            workshop.set_up(stage)
            path = workshop.project / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=True) if place == "outputs" else path.chmod(0)
            ending = run(stage.command, workshop.project, prepare=_become_nobody)
            needs_it = place == "outputs" or ending.code != 0
            wrong = (_refused(ending.code) if needs_it else []) + unexplained(ending)
            path.chmod(0o755)
            yield judge(workshop, stage, "no permission", place, wrong)


def _become_nobody() -> None:
    """As root everything would be permitted."""
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _refused(code: int | None) -> list[str]:
    return [] if code == 2 else [f"exit code {code} instead of 2"]


@contextmanager
def _own_file_system(folder: Path) -> Iterator[None]:
    """Put the content of a folder on a file system in memory, as long as it is needed."""
    beside = folder.with_name(f"{folder.name}.beside")
    folder.mkdir(exist_ok=True)
    shutil.copytree(folder, beside)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM_FOR_ALL}", "tmpfs", folder], check=True
    )
    try:
        shutil.copytree(beside, folder, dirs_exist_ok=True)
        shutil.rmtree(beside)
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
