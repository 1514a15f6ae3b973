"""How well does each score of `yrun sort` find faulty rows?

    python -m benchmarks.sort_quality --world toy
    python -m benchmarks.sort_quality --world second [--cross-fit 3] [--steps 110]
    python -m benchmarks.sort_quality --world pairs
    python -m benchmarks.sort_quality --recipe own.yaml --faults faults.jsonl [--cross-fit 0]

Prints the area under the ROC curve: the probability that a faulty row is more suspicious than a
sound one, 0.5 for guessing. The interval is the 95 % bootstrap interval over rows. `toy` is the
corpus of recipes/legal_sft.yaml, `second` that of benchmarks/second_world, on which nothing was
tuned; `pairs` are those of recipes/pairs_sort.yaml, one in ten swapped; any other corpus is a
recipe with one training file and a list of its faulty rows, such as {"row": 12, "kind": "wrong
number"}, where "+" begins details that are not told apart. Of the most suspicious tenth the number
of faulty rows is printed, and how many sound ones were expected. Missing parts (second world, base,
scores) are made first, which takes minutes; scores in the folder are graded again in seconds.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.paths import RECIPES, TOY_DATA
from benchmarks.second_world.write import write_second_world
from yrunner.commands.sort.command import sort
from yrunner.commands.train import train_base
from yrunner.console import print_table
from yrunner.scoring.order import suspicion
from yrunner.scoring.rank import KNN_SCORES, OUTLIER
from yrunner.scoring.sound_share import expect_sound

SEED = 0
BY_BASE = "By the base"
INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap areas."""

Values = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class World:
    """A corpus and the list of its faults."""

    recipe: Path
    faults: Path


@dataclass(frozen=True)
class Grade:
    """Area under the ROC curve of one score, with its interval."""

    area: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.area:.3f} [{self.low:.2f}, {self.high:.2f}]"


def main() -> None:
    """Print a table for the base and one for cross-fit, with a line for each score."""
    arguments = _parse()
    run = arguments.folder / _folder_name(arguments)
    scores = run / "sort" / "scores.jsonl"
    world = _world(arguments)
    if not scores.exists():
        _sort(world, run, arguments)
    records = [json.loads(line) for line in scores.read_text("utf-8").splitlines()]
    faults = [json.loads(line) for line in world.faults.read_text("utf-8").splitlines()]
    kind_of_row = {fault["row"]: fault["kind"].split("+")[0] for fault in faults}
    kinds = [kind_of_row.get(record["row"], "") for record in records]
    print(f"{len(records):,} rows, {len(faults):,} faulty; scores in {scores}")
    print(", ".join(f"{kind}: {kinds.count(kind)}" for kind in sorted(set(kinds) - {""})))
    for column, title in (("scores", BY_BASE), ("cross_fit", "By cross-fit")):
        if column in records[0]:
            _print_grades(title, [record[column] for record in records], kinds, arguments.resamples)


def grade(suspicion_N: Values, is_faulty_N: Flags, resamples: int) -> Grade:
    """Grade a score; the bootstrap draws sound and faulty rows separately."""
    faulty, sound = suspicion_N[is_faulty_N], suspicion_N[~is_faulty_N]
    generator = np.random.default_rng(SEED)
    areas = [
        roc_area(generator.choice(faulty, len(faulty)), generator.choice(sound, len(sound)))
        for _ in range(resamples)
    ]
    low, high = np.percentile(areas, INTERVAL)
    return Grade(roc_area(faulty, sound), float(low), float(high))


def roc_area(faulty: Values, sound: Values) -> float:
    """Return the share of pairs in which the faulty row is more suspicious; a tie counts half.

    Computed from ranks (Mann and Whitney), so that it needs a sort instead of all pairs.
    """
    _, index, count = np.unique(
        np.concatenate([faulty, sound]), return_inverse=True, return_counts=True
    )
    # Equal values share the mean of their ranks.
    ranks = (count.cumsum() - (count - 1) / 2)[index]
    below = ranks[: len(faulty)].sum() - len(faulty) * (len(faulty) + 1) / 2
    return float(below / (len(faulty) * len(sound)))


def _print_grades(
    title: str, scores: Sequence[dict[str, float]], kinds: Sequence[str], resamples: int
) -> None:
    kind_N = np.array(kinds)
    of_faults = sorted(set(kinds) - {""})
    rows: list[list[str]] = []
    best: tuple[float, str] = (0.0, "")
    for name in scores[0]:
        suspicion_N = np.array([suspicion(name, row[name]) for row in scores])
        overall = grade(suspicion_N, kind_N != "", resamples)
        best = max(best, (overall.area, name))
        by_kind = []
        for kind in of_faults:
            considered = (kind_N == kind) | (kind_N == "")
            by_kind.append(grade(suspicion_N[considered], kind_N[considered] != "", resamples))
        rows.append([name, *map(str, (overall, *by_kind))])
    print_table(title, ["score", "all", *of_faults], rows)
    print(f"{title.lower()}, the best score is {best[1]} with {best[0]:.3f}")
    for name in KNN_SCORES:
        if name in scores[0]:
            _print_worst(title, scores, kinds, name)


def _print_worst(
    title: str, scores: Sequence[dict[str, float]], kinds: Sequence[str], name: str
) -> None:
    """How many of the most suspicious tenth are faulty, and how many sound ones were expected."""
    suspicions = [suspicion(name, row[name]) for row in scores]
    number = round(len(kinds) / 10)
    worst = sorted(range(len(kinds)), key=lambda row: -suspicions[row])[:number]
    faulty = sum(kinds[row] != "" for row in worst)
    is_estimated = name == OUTLIER and title == BY_BASE
    expected = expect_sound(suspicions, number) if is_estimated else None
    told = "" if expected is None else f"; {expected} sound ones were expected"
    print(f"{title.lower()}, of the {number} most suspicious by {name} {faulty} are faulty{told}")


def _sort(world: World, folder: Path, arguments: argparse.Namespace) -> None:
    """Write the scores to `folder`; trains the base if it is missing."""
    overrides = [f"output={folder}", f"sort.cross_fit={arguments.cross_fit}"]
    if arguments.steps is not None:
        overrides.append(f"sort.cross_fit_steps={arguments.steps}")
    sort(world.recipe, overrides, overwrite=False, train_base=train_base)


def _world(arguments: argparse.Namespace) -> World:
    if arguments.recipe is not None:
        return World(arguments.recipe, arguments.faults)
    if arguments.world == "pairs":
        return World(RECIPES / "pairs_sort.yaml", TOY_DATA / "pairs_noisy_flips.jsonl")
    if arguments.world == "toy":
        return World(RECIPES / "legal_sft.yaml", TOY_DATA / "legal_faults.jsonl")
    second_world = arguments.folder / "second-world"
    write_second_world(second_world)
    return World(second_world / "second_field.yaml", second_world / "field_faults.jsonl")


def _folder_name(arguments: argparse.Namespace) -> str:
    """Return a name for the scores that differs for different settings."""
    steps = "" if arguments.steps is None else f"-{arguments.steps}"
    world = arguments.world if arguments.recipe is None else arguments.recipe.stem
    return f"{world}-{arguments.cross_fit}{steps}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", choices=("toy", "second", "pairs"), default="toy")
    parser.add_argument("--recipe", type=Path, help="a corpus of your own, with --faults")
    parser.add_argument("--faults", type=Path, help="the list of its faulty rows")
    parser.add_argument("--folder", type=Path, default=Path("outputs/sort-quality"))
    parser.add_argument("--cross-fit", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--resamples", type=int, default=500)
    arguments = parser.parse_args()
    if (arguments.recipe is None) != (arguments.faults is None):
        parser.error("--recipe and --faults belong together")
    return arguments


if __name__ == "__main__":
    main()
