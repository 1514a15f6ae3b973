"""`yrun doctor`: what this machine can run, and how to install what it lacks."""

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
from yrunner.machine import cgroup_memory

PROBED = ("torch", "deepspeed", "bitsandbytes", "hub")
"""See assembly/probes.py."""
DISTRIBUTION = "yrunner"
FOR_DEVELOPERS = "dev"
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY = 10**9
"""Processes exchange tensors in it; Docker's default of 64 MB is too small."""
LEAST_DISK = 2 * 10**9
"""Enough for a checkpoint of an adapter and its optimizer."""


def doctor(*, as_machine: bool) -> None:
    """Print everything found on this machine, as tables or as one JSON object.

    Raises `MissingError` if a part is missing that every recipe needs.
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
    """Everything found on this machine; runs are written to `folder`."""
    with (
        progress("checking this machine", len(probed)) as advance,
        ThreadPoolExecutor(len(probed)) as pool,
    ):
        answers = {name: pool.submit(ask, name) for name in probed}
        findings = [*look_at_packages(), *look_at_machine(folder)]
        for _ in as_completed(answers.values()):
            advance(1)
    return [*findings, *(finding for name in probed for finding in answers[name].result())]


def still_needed(findings: Sequence[Capability]) -> list[Capability]:
    """Missing parts that every recipe needs."""
    return [finding for finding in findings if finding.state == "missing" and finding.needed]


def _print(findings: Sequence[Capability]) -> None:
    rows = [(it.group, it.part, it.state, it.found) for it in findings]
    print_table("This machine", ("", "part", "state", "found"), rows)
    for needed, title in (
        (True, "needed by every recipe:"),
        (False, "needed by some recipes:"),
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


def look_at_packages() -> Iterator[Capability]:
    """Python, required packages and extras, from package metadata without imports."""
    yield found("packages", "python", platform.python_version())
    try:
        yield found("packages", DISTRIBUTION, version(DISTRIBUTION))
    except PackageNotFoundError:
        yield missing(
            "packages",
            DISTRIBUTION,
            "runs from a source folder without being installed, so its requirements are unknown",
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


def look_at_machine(folder: Path) -> Iterator[Capability]:
    """Memory, disk and compiler, checked without heavy imports; runs are written to `folder`."""
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
    for part, path in (("runs", folder), ("Hub cache", Path(home))):
        existing = _nearest(path)
        usage = shutil.disk_usage(existing)
        where = f"{_of(usage.free, usage.total)} at {existing}"
        if not os.access(existing, os.W_OK):
            remedy = f"chmod u+w {existing}, or choose a folder with output=/another/folder"
            why = f"{existing} is not writable"
            yield missing("disk", part, why, remedy=remedy, needed=part == "runs")
        elif usage.free < LEAST_DISK:
            remedy = f"free some space; find large folders with: du -h -d 1 {existing} | sort -h"
            yield missing("disk", part, where, remedy=remedy)
        else:
            yield found("disk", part, where)


def _compiler() -> Iterator[Capability]:
    """The build tools of DeepSpeed's operations and torch.compile."""
    compiler = os.environ.get("CXX", "g++")
    header = Path(sysconfig.get_path("include"), "Python.h")
    for part, path, remedy in (
        ("C++", shutil.which(compiler), "apt-get install g++"),
        ("Python.h", header if header.exists() else None, "apt-get install python3-dev"),
        ("ninja", shutil.which("ninja"), _ninja_remedy()),
    ):
        if path is None:
            why = "not found; needed by DeepSpeed and train.torch_compile"
            yield missing("compiler", part, why, remedy=remedy)
        else:
            yield found("compiler", part, str(path))


def _ninja_remedy() -> str:
    """DeepSpeed installs ninja, but only an active environment has it on the path."""
    scripts = Path(sysconfig.get_path("scripts"))
    if (scripts / "ninja").exists():
        return f"source {scripts / 'activate'}"
    return "pip install ninja"


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _of(free: int, total: int) -> str:
    return f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB"
