"""Does drift on the base's own rows tell what is forgotten: rank correlation over all checkpoints.

    python -m benchmarks.drift_predicts outputs/legal-keep-compare [more folders]

Reads what `yrun compare` has left of an experiment: the drift of every checkpoint of every arm and
seed, and the right answers to its general tests. Spearman's correlation of drift with general
accuracy is -1 where drift orders the checkpoints as the tests do.
"""

import argparse
from pathlib import Path

from yrunner.commands.compare.points import Measurement
from yrunner.storage.run_dir import CompareDir, RunDir
from yrunner.training.metrics import read_metrics

Pair = tuple[float, float]
"""Drift, and the share of right general answers, of one checkpoint."""


def pairs_of(run_dir: RunDir) -> list[Pair]:
    """All checkpoints of a run of which both are known."""
    measured = Measurement.load(run_dir.measured)
    if measured is None:
        return []
    records = read_metrics(run_dir.metrics)
    drifts = {row["step"]: row["eval_drift"] for row in records if "eval_drift" in row}
    return [
        (drifts[point.step], point.figures["general"])
        for point in measured.points
        if point.step in drifts
    ]


def spearman(pairs: list[Pair]) -> float:
    """Pearson's correlation of the ranks; equal values share the mean of their ranks."""
    first, second = (ranks([pair[side] for pair in pairs]) for side in (0, 1))
    mean = (len(pairs) - 1) / 2
    product = sum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True))
    lengths = [sum((rank - mean) ** 2 for rank in side) for side in (first, second)]
    return product / (lengths[0] * lengths[1]) ** 0.5


def ranks(values: list[float]) -> list[float]:
    """The place of each value among all, from 0."""
    return [
        sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values
    ]


def main() -> None:
    """Print the correlation for each run, and over all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    every: list[Pair] = []
    for folder in parser.parse_args().folders:
        for run in sorted(path for path in CompareDir(folder).arms.iterdir() if path.is_dir()):
            pairs = pairs_of(RunDir(run))
            every += pairs
            for drift, general in pairs:
                print(f"{run.name:32} drift {drift:8.4f}  general {general:6.1%}")
    print(f"{len(every)} checkpoints: Spearman {spearman(every):+.3f}")


if __name__ == "__main__":
    main()
