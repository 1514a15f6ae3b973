"""Corrupt recipes at random; each must load, or fail fast with a message and a line number."""

import json
import random
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.faults.cases import Case
from tests.recipe.mutations import MUTATIONS, WHOLE, write_surroundings
from yrunner.errors import RecipeError
from yrunner.recipe.load import load_recipe

MAX_SECONDS = 1.0
"""CPU time, so that load from other programs does not matter."""
MAX_BYTES = 500_000_000
"""Peak of the whole process, Python and all recipes included."""
PLACE = re.compile(r"recipe\.yaml(:[1-9]\d*:[1-9]\d*)?")


def recipe_cases(num_cases: int, generator: random.Random) -> Iterator[Case]:
    """Corrupt recipes with each mutation in turn."""
    with TemporaryDirectory() as folder:
        path = write_surroundings(Path(folder)) / "recipe.yaml"
        for count in range(num_cases):
            mutate = MUTATIONS[count % len(MUTATIONS)]
            path.write_bytes(mutate(generator, WHOLE))
            started = time.process_time()
            outcome, lost = _load(path)
            seconds = time.process_time() - started
            if seconds > MAX_SECONDS:
                lost.append(f"it took {seconds:.2f} seconds")
            yield Case("corrupt recipe", mutate.__name__, outcome, tuple(lost))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lost = [] if peak < MAX_BYTES else [f"{peak:,} bytes"]
    yield Case("corrupt recipe", "memory", f"at most {MAX_BYTES:,} bytes", tuple(lost))


def _load(path: Path) -> tuple[str, list[str]]:
    try:
        load_recipe(path)
    except RecipeError as error:
        lost = []
        for problem in error.problems:
            if not PLACE.fullmatch(problem.where.removeprefix(f"{path.parent}/")):
                lost.append(f"no line number: {problem}")
            if not problem.message or "\n" in str(problem):
                lost.append(f"no message: {problem}")
        return "refused", lost
    except Exception as error:  # noqa: BLE001  any other error is a loss
        return "raised", [repr(error)]
    return "still valid", []


def main() -> None:
    """Print every case as a JSON line; runs as a separate process, without torch."""
    num_cases, seed = map(int, sys.argv[1:])
    for case in recipe_cases(num_cases, random.Random(seed)):
        print(json.dumps(case.as_json()))


if __name__ == "__main__":
    main()
