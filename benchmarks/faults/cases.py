"""Cases of the campaign, and what each of them lost."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.faults.child import Ending
from benchmarks.faults.stages import Stage, Workshop, differences, half_written


@dataclass(frozen=True)
class Case:
    """One injected fault and its damage."""

    campaign: str
    what: str
    """The command, kind of row or kind of recipe that was disturbed."""
    fault: str
    """What happened, and when; enough to reproduce it."""
    lost: tuple[str, ...] = ()
    """Everything that is wrong; empty if the case survived."""

    def as_json(self) -> dict[str, Any]:
        """Return the case as a record."""
        return asdict(self)


def judge(
    workshop: Workshop, stage: Stage, campaign: str, fault: str, wrong: Iterable[str] = ()
) -> Case:
    """Recover from a fault, and compare the results with those of an undisturbed command.

    `wrong`: problems found right after the fault.
    """
    lost = [*wrong]
    lost += [f"{path} is half-written" for path in half_written(workshop.project)]
    expected = workshop.reference(stage).results
    ending = workshop.recover(stage)
    if ending.code != 0:
        lost.append(f"it did not recover, exit code {ending.code}: {ending.output[-500:]}")
    else:
        results = workshop.results(stage)
        # Prepared rows of another version of a data file may stay there.
        results = {path: results[path] for path in results if must_match(path, expected)}
        lost += [f"{path} differs in the end" for path in differences(expected, results)]
        lost += [f"{path} is half-written" for path in half_written(workshop.project)]
    return Case(campaign, stage.name, fault, tuple(lost))


def must_match(path: str, expected: Mapping[str, str]) -> bool:
    """Return whether a file must be the same as after an undisturbed run."""
    return path in expected or "/.prepared/" not in path


def unexplained(ending: Ending) -> list[str]:
    """Return what is wrong with a failure: an unexpected exit code, a traceback, or no message."""
    if ending.code == 0:
        return []
    lines = ending.output.strip().splitlines()
    wrong = [f"exit code {ending.code}"] if ending.code not in (2, 3) else []
    if "Traceback" in ending.output or not lines:
        wrong.append(f"no message: {ending.output[-800:]}")
    return wrong
