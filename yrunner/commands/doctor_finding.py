"""What was found of one part of the machine, and what would mend it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One part: there, or missing with the command that adds it."""

    group: str
    """What the part belongs to, such as `compiler`."""
    part: str
    state: Literal["ok", "missing"]
    found: str
    """A version, a size, or what is wrong."""
    remedy: str = ""
    """What to do where it is missing; a command where one does it."""
    needed: bool = False
    """Whether yrunner itself cannot do without it, and not just some recipes."""


def found(group: str, part: str, what: str) -> Finding:
    """A part that is there."""
    return Finding(group, part, "ok", what)


def missing(group: str, part: str, why: str, *, remedy: str, needed: bool = False) -> Finding:
    """A part that is not there, or not as it should be."""
    return Finding(group, part, "missing", why, remedy, needed)


def still_needed(findings: Sequence[Finding]) -> list[Finding]:
    """What yrunner cannot run without."""
    return [finding for finding in findings if finding.state == "missing" and finding.needed]
