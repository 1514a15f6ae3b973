"""Recipes spoilt at random: each loads, or says at which place what is wrong with it, at once."""

import json
import random
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.fault_campaign.cases import Case
from tests.recipe.mutations import MUTATIONS, WHOLE, write_surroundings
from yrunner.errors import RecipeError
from yrunner.recipe.load import load_recipe

MOST_SECONDS = 1.0
"""Of the processor: others may use this machine."""
MOST_BYTES = 500_000_000
"""Of the whole process, Python and all recipes included."""
PLACE = re.compile(r"recipe\.yaml(:[1-9]\d*:[1-9]\d*)?")


def recipe_cases(number: int, chance: random.Random) -> Iterator[Case]:
    """So many spoilt recipes, the ways to spoil one in turn."""
    with TemporaryDirectory() as folder:
        path = write_surroundings(Path(folder)) / "recipe.yaml"
        for count in range(number):
            mutate = MUTATIONS[count % len(MUTATIONS)]
            path.write_bytes(mutate(chance, WHOLE))
            started = time.process_time()
            fate, lost = _fate(path)
            seconds = time.process_time() - started
            if seconds > MOST_SECONDS:
                lost.append(f"it took {seconds:.2f} seconds")
            yield Case("spoilt recipe", mutate.__name__, fate, tuple(lost))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lost = [] if peak < MOST_BYTES else [f"{peak:,} bytes"]
    yield Case("spoilt recipe", "memory of all", f"at most {MOST_BYTES:,} bytes", tuple(lost))


def _fate(path: Path) -> tuple[str, list[str]]:
    try:
        load_recipe(path)
    except RecipeError as error:
        lost = []
        for problem in error.problems:
            if not PLACE.fullmatch(problem.where.removeprefix(f"{path.parent}/")):
                lost.append(f"no place: {problem}")
            if not problem.message or "\n" in str(problem):
                lost.append(f"no sentence: {problem}")
        return "refused", lost
    except Exception as error:  # noqa: BLE001  what must not come
        return "raised", [repr(error)]
    return "valid all the same", []


def main() -> None:
    """Print every case as a line of JSON, in a process of its own that has not imported torch."""
    number, seed = map(int, sys.argv[1:])
    for case in recipe_cases(number, random.Random(seed)):
        print(json.dumps(case.as_json()))


if __name__ == "__main__":
    main()
