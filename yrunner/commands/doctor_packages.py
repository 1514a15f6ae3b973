"""Which packages are installed, from their metadata alone: nothing is imported."""

import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement

from yrunner.commands.doctor_finding import Finding, found, missing

DISTRIBUTION = "yrunner"
FOR_DEVELOPERS = "dev"


def look_at_packages() -> Iterator[Finding]:
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


def _look_at(requirement: Requirement, group: str, remedy: str, *, needed: bool) -> Finding:
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return missing(group, requirement.name, "not installed", remedy=remedy, needed=needed)
    if not requirement.specifier.contains(installed, prereleases=True):
        why = f"{installed} is installed, {requirement.specifier} is needed"
        return missing(group, requirement.name, why, remedy=remedy, needed=needed)
    return found(group, requirement.name, installed)
