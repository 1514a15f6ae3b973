"""Kill every command at a random time or before a random file operation."""

import random
from collections.abc import Iterator

from benchmarks.faults.cases import Case, judge
from benchmarks.faults.child import Disturbance, kill_self, run
from benchmarks.faults.stages import Stage, Workshop

CAMPAIGN = "killed"
TOO_SHORT_FOR_THE_CLOCK = "saving"


def kill_cases(workshop: Workshop, num_cases: int, generator: random.Random) -> Iterator[Case]:
    """Kill the commands in turn; each must recover with the right results."""
    for count in range(num_cases):
        stage = workshop.stages[count % len(workshop.stages)]
        by_clock = count // len(workshop.stages) % 2 == 1 and stage.name != TOO_SHORT_FOR_THE_CLOCK
        yield _kill(workshop, stage, by_clock=by_clock, generator=generator)


def _kill(workshop: Workshop, stage: Stage, *, by_clock: bool, generator: random.Random) -> Case:
    reference = workshop.reference(stage).ending
    latest = reference.seconds
    while True:
        workshop.set_up(stage)
        if by_clock:
            moment = generator.uniform(0, latest)
            fault = f"after {moment:.2f} seconds"
            ending = run(stage.command, workshop.project, killed_after=moment)
        else:
            operation = generator.randint(1, reference.operations)
            fault = f"before file operation {operation} of {reference.operations}"
            disturbance = Disturbance(operation, kill_self)
            ending = run(stage.command, workshop.project, disturbance=disturbance)
        if ending.code is None:
            return judge(workshop, stage, CAMPAIGN, fault)
        # The command ended before it was killed.
        latest = min(latest, ending.seconds)
