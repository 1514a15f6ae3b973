"""SIGKILL at random moments of every kind of work, by the clock and between two file operations."""

import random
from collections.abc import Iterator

from benchmarks.fault_campaign.cases import Case, judge
from benchmarks.fault_campaign.child import Disturbance, kill_oneself, run
from benchmarks.fault_campaign.stages import Stage, Workshop

CAMPAIGN = "killed"
TOO_SHORT_FOR_THE_CLOCK = "saving"


def kill_cases(workshop: Workshop, number: int, chance: random.Random) -> Iterator[Case]:
    """So many kills, the kinds of work in turn; each command has to go on to the right end."""
    for count in range(number):
        stage = workshop.stages[count % len(workshop.stages)]
        by_clock = count // len(workshop.stages) % 2 == 1 and stage.name != TOO_SHORT_FOR_THE_CLOCK
        yield _kill(workshop, stage, by_clock=by_clock, chance=chance)


def _kill(workshop: Workshop, stage: Stage, *, by_clock: bool, chance: random.Random) -> Case:
    reference = workshop.reference(stage).ending
    latest = reference.seconds
    while True:
        workshop.set_up(stage)
        if by_clock:
            moment = chance.uniform(0, latest)
            fault = f"after {moment:.2f} seconds"
            ending = run(stage.command, workshop.project, killed_after=moment)
        else:
            operation = chance.randint(1, reference.operations)
            fault = f"before operation {operation} of {reference.operations} on files"
            disturbance = Disturbance(operation, kill_oneself)
            ending = run(stage.command, workshop.project, disturbance=disturbance)
        if ending.code is None:
            return judge(workshop, stage, CAMPAIGN, fault)
        # It was faster this time, and ended before.
        latest = min(latest, ending.seconds)
