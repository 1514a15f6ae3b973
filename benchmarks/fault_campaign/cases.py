"""What became of each case: it survived, or something was lost and is named."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.fault_campaign.child import Ending
from benchmarks.fault_campaign.stages import Stage, Workshop, differences, half_written


@dataclass(frozen=True)
class Case:
    """One fault, and what it has cost."""

    campaign: str
    what: str
    """The kind of work, of row or of recipe that was disturbed."""
    fault: str
    """What happened, and when: enough to repeat it."""
    lost: tuple[str, ...] = ()
    """Everything that is not as it has to be; nothing where the case has survived."""

    def as_json(self) -> dict[str, Any]:
        """The case as a line of the record."""
        return asdict(self)


def judge(
    workshop: Workshop, stage: Stage, campaign: str, fault: str, found: Iterable[str] = ()
) -> Case:
    """Go on after a fault, and compare the end with that of the undisturbed command.

    `found`: what was wrong at once.
    """
    lost = [*found]
    lost += [f"{path} is half-written" for path in half_written(workshop.project)]
    expected = workshop.reference(stage).results
    ending = workshop.go_on(stage)
    if ending.code != 0:
        lost.append(f"it did not go on, exit code {ending.code}: {ending.output[-500:]}")
    else:
        results = workshop.results(stage)
        # What has been prepared of another content of a data file may stay beside.
        results = {path: results[path] for path in results if is_due(path, expected)}
        lost += [f"{path} differs in the end" for path in differences(expected, results)]
        lost += [f"{path} is half-written" for path in half_written(workshop.project)]
    return Case(campaign, stage.name, fault, tuple(lost))


def is_due(path: str, expected: Mapping[str, str]) -> bool:
    """Whether a file has to be the same as after an undisturbed run."""
    return path in expected or "/.prepared/" not in path


def unexplained(ending: Ending) -> list[str]:
    """What is wrong with how a command ended by itself: without a sentence, or with a traceback."""
    if ending.code == 0:
        return []
    lines = ending.output.strip().splitlines()
    wrong = [f"exit code {ending.code}"] if ending.code not in (2, 3) else []
    if "Traceback" in ending.output or not lines:
        wrong.append(f"no sentence: {ending.output[-800:]}")
    return wrong
