"""`yrun doctor`: what this machine can run, and the commands that add what it lacks.

What was found of one part of the machine, and what would mend it.

Memory, disk and compiler: what can be seen without importing a heavy package.

Which packages are installed, from their metadata alone: nothing is imported.
"""

import json
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from yrunner.assembly.probes import Capability, ask, found, missing
from yrunner.console import print_table, progress, say
from yrunner.errors import MissingError
from yrunner.models.local import cgroup_memory


def still_needed(findings: Sequence[Capability]) -> list[Capability]:
    """What yrunner cannot run without."""
    return [finding for finding in findings if finding.state == "missing" and finding.needed]


SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY = 10**9
"""What processes hand each other their tensors in: Docker's default of 64 MB is too little."""
LEAST_DISK = 2 * 10**9
"""A checkpoint of the smallest real models, an adapter and its optimizer, takes less."""


def look_at_machine(folder: Path) -> Iterator[Capability]:
    """Memory, disk and compiler of this machine; runs would be written below `folder`."""
    yield from _memory()
    yield from _disk(folder)
    yield from _compiler()


def _memory() -> Iterator[Capability]:
    memory = psutil.virtual_memory()
    yield found("memory", "machine", _of(memory.available, memory.total))
    container = cgroup_memory()
    if container is not None:
        yield found("memory", "container", _of(container.free, container.limit))
    if not SHARED_MEMORY.is_dir():
        return
    shared = shutil.disk_usage(SHARED_MEMORY)
    if shared.total >= LEAST_SHARED_MEMORY:
        yield found("memory", "shared", _of(shared.free, shared.total))
        return
    yield missing(
        "memory",
        "shared",
        f"{_of(shared.free, shared.total)}; several processes may need more",
        remedy="start the container with: docker run --shm-size=8g ...",
    )


def _disk(folder: Path) -> Iterator[Capability]:
    home = os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")
    for part, place in (("runs", folder), ("models of the Hub", Path(home))):
        here = _nearest(place)
        usage = shutil.disk_usage(here)
        where = f"{_of(usage.free, usage.total)} at {here}"
        if not os.access(here, os.W_OK):
            remedy = f"chmod u+w {here}, or choose a folder with output=/another/folder"
            why = f"{here} cannot be written"
            yield missing("disk", part, why, remedy=remedy, needed=part == "runs")
        elif usage.free < LEAST_DISK:
            remedy = f"free some space; see what takes it with: du -h -d 1 {here} | sort -h"
            yield missing("disk", part, where, remedy=remedy)
        else:
            yield found("disk", part, where)


def _compiler() -> Iterator[Capability]:
    """What DeepSpeed's operations and torch.compile are built with."""
    compiler = os.environ.get("CXX", "g++")
    header = Path(sysconfig.get_path("include"), "Python.h")
    for part, place, remedy in (
        ("C++", shutil.which(compiler), "apt-get install g++"),
        ("Python.h", header if header.exists() else None, "apt-get install python3-dev"),
        ("ninja", shutil.which("ninja"), _how_to_get_ninja()),
    ):
        if place is None:
            why = "not found; DeepSpeed and train.torch_compile build code with it"
            yield missing("compiler", part, why, remedy=remedy)
        else:
            yield found("compiler", part, str(place))


def _how_to_get_ninja() -> str:
    """It comes with DeepSpeed, but only an active environment has it on the path."""
    scripts = Path(sysconfig.get_path("scripts"))
    if (scripts / "ninja").exists():
        return f"source {scripts / 'activate'}"
    return "pip install ninja"


def _nearest(folder: Path) -> Path:
    """The folder, or the one above it that exists already."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _of(free: int, total: int) -> str:
    return f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB"


DISTRIBUTION = "yrunner"
FOR_DEVELOPERS = "dev"


def look_at_packages() -> Iterator[Capability]:
    """Python, the packages that yrunner needs, and those of its extras."""
    yield found("packages", "python", platform.python_version())
    try:
        yield found("packages", DISTRIBUTION, version(DISTRIBUTION))
    except PackageNotFoundError:
        yield missing(
            "packages",
            DISTRIBUTION,
            "runs from a folder and is not installed: what it needs is not known",
            remedy="pip install -e . in that folder",
        )
        return
    requirements = [Requirement(line) for line in requires(DISTRIBUTION) or []]
    for requirement in _without_extra(requirements):
        yield _look_at(requirement, "packages", f"pip install '{requirement}'", needed=True)
    for extra in metadata(DISTRIBUTION).get_all("Provides-Extra") or []:
        if extra == FOR_DEVELOPERS:
            continue
        for requirement in _of_extra(requirements, extra):
            remedy = f"pip install '{DISTRIBUTION}[{extra}]'"
            yield _look_at(requirement, "extras", remedy, needed=False)


def _without_extra(requirements: Iterable[Requirement]) -> Iterator[Requirement]:
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            yield requirement


def _of_extra(requirements: Iterable[Requirement], extra: str) -> Iterator[Requirement]:
    return (
        requirement
        for requirement in requirements
        if requirement.marker is not None and requirement.marker.evaluate({"extra": extra})
    )


def _look_at(requirement: Requirement, group: str, remedy: str, *, needed: bool) -> Capability:
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return missing(group, requirement.name, "not installed", remedy=remedy, needed=needed)
    if not requirement.specifier.contains(installed, prereleases=True):
        why = f"{installed} is installed, {requirement.specifier} is needed"
        return missing(group, requirement.name, why, remedy=remedy, needed=needed)
    return found(group, requirement.name, installed)


PROBED = ("torch", "deepspeed", "bitsandbytes", "hub")
"""What is asked in processes of their own, see doctor_probes.py."""


def doctor(*, as_machine: bool) -> None:
    """Look at this machine and print every finding, or one JSON object.

    Raises `MissingError` where something is missing that yrunner itself needs.
    """
    findings = examine(Path.cwd(), PROBED)
    needed = still_needed(findings)
    if as_machine:
        content = {"ready": not needed, "findings": [asdict(finding) for finding in findings]}
        say(json.dumps(content, ensure_ascii=False, indent=2))
    else:
        _print(findings)
    if needed:
        names = ", ".join(finding.part for finding in needed)
        raise MissingError(
            f"yrunner cannot run here: {names}",
            remedy="; ".join(dict.fromkeys(finding.remedy for finding in needed)),
        )


def examine(folder: Path, probed: Sequence[str]) -> list[Capability]:
    """Everything that can be found out here; runs would be written below `folder`."""
    with (
        progress("looking at this machine", len(probed)) as advance,
        ThreadPoolExecutor(len(probed)) as pool,
    ):
        asked = {name: pool.submit(ask, name) for name in probed}
        findings = [*look_at_packages(), *look_at_machine(folder)]
        for _ in as_completed(asked.values()):
            advance(1)
    return [*findings, *(finding for name in probed for finding in asked[name].result())]


def _print(findings: Sequence[Capability]) -> None:
    rows = [(it.group, it.part, it.state, it.found) for it in findings]
    print_table("This machine", ("", "part", "state", "found"), rows)
    for needed, title in (
        (True, "yrunner needs this:"),
        (False, "only some recipes need this:"),
    ):
        lines = [
            f"  {finding.part}: {finding.remedy}"
            for finding in findings
            if finding.state == "missing" and finding.needed == needed
        ]
        if lines:
            say("\n".join([title, *lines]))
    if not still_needed(findings):
        say("yrunner can train here")
