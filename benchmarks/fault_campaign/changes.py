"""A data file that somebody writes to, cuts or removes while each kind of work reads it."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.fault_campaign.cases import Case, judge, unexplained
from benchmarks.fault_campaign.child import Disturbance, run
from benchmarks.fault_campaign.project import row
from benchmarks.fault_campaign.stages import Stage, Workshop, differences

READERS = ("training", "preparing data", "sorting")
SENTENCES = (
    "has changed while it was read",
    "is gone",
    "there is no file",
    "no such file",
)


def _append(path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row(9_999)) + "\n")


def _cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_text("".join(json.dumps(row(number)) + "\n" for number in range(50, 80)), "utf-8")
    other.rename(path)


def _remove(path: Path) -> None:
    path.unlink()


ACTS: dict[str, Callable[[Path], None]] = {
    "appended to": _append,
    "cut in half": _cut,
    "replaced": _replace,
    "removed": _remove,
}


def changing_file_cases(workshop: Workshop, number: int, chance: random.Random) -> Iterator[Case]:
    """Either a sentence that names change or row, or the result of one content: never a mixture."""
    stages = [stage for stage in workshop.stages if stage.name in READERS]
    for count in range(number if stages else 0):
        stage = stages[count % len(stages)]
        what = list(ACTS)[count // len(stages) % len(ACTS)]
        yield _change(workshop, stage, what, chance)


def _change(workshop: Workshop, stage: Stage, what: str, chance: random.Random) -> Case:
    reference = workshop.reference(stage)
    workshop.set_up(stage)
    file = workshop.project / stage.data
    whole = file.read_bytes()
    operation = chance.randint(1, reference.ending.operations)
    disturbance = Disturbance(operation, partial(ACTS[what], file))
    ending = run(stage.command, workshop.project, disturbance=disturbance)
    wrong = unexplained(ending)
    if ending.code == 0:
        wrong += _mixture(workshop, stage, what, file, whole)
    elif not any(sentence in ending.output for sentence in (*SENTENCES, f"{file.name} row ")):
        wrong.append(f"the change is not named: {ending.output[-500:]}")
    file.write_bytes(whole)
    # What was measured of a row is kept, and beside other rows its last digits were others.
    shutil.rmtree(workshop.project / "outputs/tuned/sort/measured", ignore_errors=True)
    fault = f"{what} at operation {operation}, exit code {ending.code}"
    return judge(workshop, stage, "changing file", fault, wrong)


def _mixture(workshop: Workshop, stage: Stage, what: str, file: Path, whole: bytes) -> list[str]:
    """What is wrong with results that neither the old content nor the new one explains."""
    found = workshop.results(stage)
    if not differences(workshop.reference(stage).results, found):
        return []
    workshop.set_up(stage)
    file.write_bytes(whole)
    ACTS[what](file)
    ending = run(stage.command, workshop.project)
    if ending.code == 0 and not differences(workshop.results(stage), found):
        return []
    return ["the result is that of no content that the file has had"]
