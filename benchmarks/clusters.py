"""Time to find the clusters of a sort, given the contexts of its rows.

    python -m benchmarks.clusters [--rows 1000 5000 20000] [--targets 20]

Rows are drawn around fifty centres, a tenth of them around none.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from yrunner.errors import Origin
from yrunner.scoring.clusters import find_clusters
from yrunner.scoring.measure import CONTEXT_SIZE, TokenScores

CENTRES = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 5000, 20_000])
    parser.add_argument("--targets", type=int, default=20, help="of each row")
    options = parser.parse_args()
    for rows in options.rows:
        scores = corpus(rows, options.targets)
        started = time.perf_counter()
        found = find_clusters(scores, [range(row, row + 1) for row in range(rows)],
                              smallest=None, seed=0)  # fmt: skip
        seconds = time.perf_counter() - started
        print(f"{rows:,} rows: {seconds:.1f} s, {len(found.central)} clusters")


def corpus(rows: int, targets: int) -> list[TokenScores]:
    """Contexts of rows, each around the centre of its group or one of its own."""
    chance = np.random.default_rng(0)
    centre_KC = chance.normal(size=(CENTRES, CONTEXT_SIZE))
    scores = []
    for row in range(rows):
        centre_C = centre_KC[row % CENTRES] if row % 10 else chance.normal(size=CONTEXT_SIZE)
        context_NC = centre_C + 0.5 * chance.normal(size=(targets, CONTEXT_SIZE))
        context_NC /= np.linalg.norm(context_NC, axis=1, keepdims=True)
        figure_N, ids_N = torch.zeros(targets), torch.zeros(targets, dtype=torch.long)
        context = torch.from_numpy(context_NC).half()
        origin = Origin(Path("rows"), row + 1)
        scores.append(TokenScores(figure_N, figure_N, figure_N, ids_N, origin, context))
    return scores


if __name__ == "__main__":
    main()
