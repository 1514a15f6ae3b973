"""How well each score of `yrun sort` finds the faulty rows, where it is known which these are.

    python -m benchmarks.sort_quality --world toy
    python -m benchmarks.sort_quality --world second [--cross-fit 3] [--steps 110]

A figure is the area under the ROC curve: the chance that a faulty row is more suspicious than a
sound one, 0.5 by guessing. The interval is where it lies in 95 % of the corpora that are drawn from
the rows with replacement. `toy` is the corpus of recipes/legal_sft.yaml, `second` that of
benchmarks/second_world, on which nothing is tuned. What is missing (the second world, a base, the
scores) is made first, in minutes; scores that are in the folder are graded again in seconds.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.second_world.write import write_second_world
from yrunner.commands.sort.command import sort
from yrunner.commands.train import train_base
from yrunner.console import print_table
from yrunner.scoring.rank import suspicion

ROOT = Path(__file__).parents[1]
SEED = 0
INTERVAL = (2.5, 97.5)
"""Percentiles of the areas of the drawn corpora."""

Values = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class World:
    """A corpus with a list of its faults."""

    recipe: Path
    faults: Path


@dataclass(frozen=True)
class Grade:
    """How well one score finds some faults."""

    area: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.area:.3f} [{self.low:.2f}, {self.high:.2f}]"


def main() -> None:
    """Print a table for the base and one for cross-fit: a line for each score."""
    arguments = _parse()
    run = arguments.folder / _name(arguments)
    scores = run / "sort" / "scores.jsonl"
    world = _world(arguments.world, arguments.folder)
    if not scores.exists():
        _sort(world, run, arguments)
    records = [json.loads(line) for line in scores.read_text("utf-8").splitlines()]
    faults = [json.loads(line) for line in world.faults.read_text("utf-8").splitlines()]
    kind_of_row = {fault["row"]: fault["kind"] for fault in faults}
    kinds = [kind_of_row.get(record["row"], "") for record in records]
    print(f"{len(records):,} rows, {len(faults):,} of them faulty; {scores}")
    print(", ".join(f"{kind}: {kinds.count(kind)}" for kind in sorted(set(kinds) - {""})))
    for column, title in (("scores", "By the base"), ("cross_fit", "By cross-fit")):
        if column in records[0]:
            _print_grades(title, [record[column] for record in records], kinds, arguments.resamples)


def grade(suspicion_N: Values, is_faulty_N: Flags, resamples: int) -> Grade:
    """The area of a score, and its interval over rows; sound and faulty ones are drawn apart."""
    faulty, sound = suspicion_N[is_faulty_N], suspicion_N[~is_faulty_N]
    generator = np.random.default_rng(SEED)
    areas = [
        roc_area(generator.choice(faulty, len(faulty)), generator.choice(sound, len(sound)))
        for _ in range(resamples)
    ]
    low, high = np.percentile(areas, INTERVAL)
    return Grade(roc_area(faulty, sound), float(low), float(high))


def roc_area(faulty: Values, sound: Values) -> float:
    """The share of pairs in which the faulty row is the more suspicious; a tie counts one half.

    By ranks (Mann and Whitney), which needs a sort instead of a look at every pair.
    """
    _, place, count = np.unique(
        np.concatenate([faulty, sound]), return_inverse=True, return_counts=True
    )
    # Equal values share the mean of the ranks that they take up.
    ranks = (count.cumsum() - (count - 1) / 2)[place]
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
    print(f"{title.lower()}, the best is {best[1]} with {best[0]:.3f}")


def _sort(world: World, folder: Path, arguments: argparse.Namespace) -> None:
    """Leave the scores in `folder`; a base that is missing is trained."""
    overrides = [f"output={folder}", f"sort.cross_fit={arguments.cross_fit}"]
    if arguments.steps is not None:
        overrides.append(f"sort.cross_fit_steps={arguments.steps}")
    sort(world.recipe, overrides, overwrite=False, train_base=train_base)


def _world(name: str, folder: Path) -> World:
    if name == "toy":
        recipes = ROOT / "recipes"
        return World(recipes / "legal_sft.yaml", recipes / "data/legal_faults.jsonl")
    place = folder / "second-world"
    write_second_world(place)
    return World(place / "second_field.yaml", place / "field_faults.jsonl")


def _name(arguments: argparse.Namespace) -> str:
    """Of the folder of the scores: another one for other settings."""
    steps = "" if arguments.steps is None else f"-{arguments.steps}"
    return f"{arguments.world}-{arguments.cross_fit}{steps}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", choices=("toy", "second"), default="toy")
    parser.add_argument("--folder", type=Path, default=Path("outputs/sort-quality"))
    parser.add_argument("--cross-fit", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--resamples", type=int, default=500)
    return parser.parse_args()


if __name__ == "__main__":
    main()
