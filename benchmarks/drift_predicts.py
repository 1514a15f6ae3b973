"""Does drift on rows that the base wrote predict forgetting?

    python -m benchmarks.drift_predicts outputs/legal-keep-compare [more folders]

Reads the results of `yrun compare`: drift and general accuracy of every checkpoint of every arm and
seed. Prints Spearman's correlation of both; -1 means that drift ranks the checkpoints exactly as
the general tests do.
"""

import argparse
from pathlib import Path

from yrunner.commands.compare.points import Measurement
from yrunner.storage.run_dir import CompareDir, RunDir
from yrunner.training.metrics import read_metrics

Pair = tuple[float, float]
"""Drift and general accuracy of one checkpoint."""


def pairs_of(run_dir: RunDir) -> list[Pair]:
    """Return drift and accuracy of all checkpoints of a run that have both."""
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
    """Return Pearson's correlation of the ranks; equal values share the mean of their ranks."""
    first, second = (ranks([pair[side] for pair in pairs]) for side in (0, 1))
    mean = (len(pairs) - 1) / 2
    product = sum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True))
    lengths = [sum((rank - mean) ** 2 for rank in side) for side in (first, second)]
    return product / (lengths[0] * lengths[1]) ** 0.5


def ranks(values: list[float]) -> list[float]:
    """Return the rank of each value, from 0."""
    return [
        sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values
    ]


def main() -> None:
    """Print drift and accuracy of each checkpoint, and their correlation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    all_pairs: list[Pair] = []
    for folder in parser.parse_args().folders:
        for run in sorted(path for path in CompareDir(folder).arms.iterdir() if path.is_dir()):
            pairs = pairs_of(RunDir(run))
            all_pairs += pairs
            for drift, general in pairs:
                print(f"{run.name:32} drift {drift:8.4f}  general {general:6.1%}")
    print(f"{len(all_pairs)} checkpoints: Spearman {spearman(all_pairs):+.3f}")


if __name__ == "__main__":
    main()
