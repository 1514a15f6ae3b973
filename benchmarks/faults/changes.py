"""Change, truncate or remove a data file while a command reads it."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.faults.cases import Case, judge, unexplained
from benchmarks.faults.child import Disturbance, run
from benchmarks.faults.project import row
from benchmarks.faults.stages import Stage, Workshop, differences

READERS = ("training", "preparing data", "sorting")
MESSAGES = (
    "changed while it was being read",
    "no longer exists",
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


CHANGES: dict[str, Callable[[Path], None]] = {
    "appended to": _append,
    "cut in half": _cut,
    "replaced": _replace,
    "removed": _remove,
}


def changing_file_cases(
    workshop: Workshop, num_cases: int, generator: random.Random
) -> Iterator[Case]:
    """Expect a message that names the change or the row, or the result of one version."""
    stages = [stage for stage in workshop.stages if stage.name in READERS]
    for count in range(num_cases if stages else 0):
        stage = stages[count % len(stages)]
        change = list(CHANGES)[count // len(stages) % len(CHANGES)]
        yield _change(workshop, stage, change, generator)


def _change(workshop: Workshop, stage: Stage, change: str, generator: random.Random) -> Case:
    reference = workshop.reference(stage)
    workshop.set_up(stage)
    file = workshop.project / stage.data
    content = file.read_bytes()
    operation = generator.randint(1, reference.ending.operations)
    disturbance = Disturbance(operation, partial(CHANGES[change], file))
    ending = run(stage.command, workshop.project, disturbance=disturbance)
    wrong = unexplained(ending)
    if ending.code == 0:
        wrong += _mixture(workshop, stage, change, file, content)
    elif not any(message in ending.output for message in (*MESSAGES, f"{file.name} row ")):
        wrong.append(f"the message does not name the change: {ending.output[-500:]}")
    file.write_bytes(content)
    # Saved measurements of a row may differ in the last digits: other rows shared its batch.
    shutil.rmtree(workshop.project / "outputs/tuned/sort/measured", ignore_errors=True)
    fault = f"{change} at operation {operation}, exit code {ending.code}"
    return judge(workshop, stage, "changing file", fault, wrong)


def _mixture(
    workshop: Workshop, stage: Stage, change: str, file: Path, content: bytes
) -> list[str]:
    """Return an error if the results match neither the old nor the new version of the file."""
    results = workshop.results(stage)
    if not differences(workshop.reference(stage).results, results):
        return []
    workshop.set_up(stage)
    file.write_bytes(content)
    CHANGES[change](file)
    ending = run(stage.command, workshop.project)
    if ending.code == 0 and not differences(workshop.results(stage), results):
        return []
    return ["the result matches no version of the file"]
