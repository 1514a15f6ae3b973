"""Do processes change what is learned? One process against two, every way of sharing memory out.

    python -m benchmarks.ranks                        # the whole matrix
    python -m benchmarks.ranks ddp zero3              # some of its rows
    python -m benchmarks.ranks --pairs                # half of it, where all pairs still meet
    python -m benchmarks.ranks --folder outputs/ranks # goes on where it was interrupted

Two real processes train a tiny model by gloo, plainly and under DeepSpeed ZeRO 1, 2 and 3, with the
optimizer's memory offloaded too. The updates are those of one process with twice the micro-steps:
losses must be the same step by step, and so must the weights in the end.
"""

import argparse
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from benchmarks.ranks_cases import LOSSES, ROWS, SHARINGS, TUNINGS, Case, write_base
from benchmarks.ranks_training import found_together, save_found, start_processes, train_case


def matrix(sharings: Sequence[str], *, pairs: bool = False) -> list[Case]:
    """Every combination; with `pairs` half of them, in which any two values still meet."""
    cases = [Case(*parts) for parts in product(sharings, LOSSES, ROWS, TUNINGS)]
    return [case for case in cases if not pairs or _place(case) % 2 == 0]


def _place(case: Case) -> int:
    """Neighbours in any direction of the matrix have numbers next to each other."""
    chosen = ((LOSSES, case.loss), (ROWS, case.rows), (TUNINGS, case.tuning))
    return sum(list(options).index(value) for options, value in chosen)


def main() -> None:
    """Print both gaps of every case as it ends, and the largest of every way of sharing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sharings", nargs="*", choices=[[], *SHARINGS], help="default all")
    parser.add_argument("--folder", type=Path, help="keep results here, and do only what is not")
    parser.add_argument("--pairs", action="store_true", help="half of the combinations")
    options = parser.parse_args()
    sharings = options.sharings or list(SHARINGS)
    with tempfile.TemporaryDirectory() as name:
        compare_all(matrix(sharings, pairs=options.pairs), options.folder or Path(name))


def compare_all(cases: Sequence[Case], folder: Path) -> None:
    """Train what has no result in `folder` yet, and print how far all are from one process."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        write_base(folder / "base")
    for case in dict.fromkeys(case.alone for case in cases):
        if not case.result(folder).exists():
            save_found(train_case(case, folder), case, folder)
    missing = [case for case in cases if not case.result(folder).exists()]
    if missing:
        start_processes(missing, folder, tell=print_gaps)
    print("| | cases | losses | weights |\n|---|---|---|---|")
    for sharing in dict.fromkeys(case.sharing for case in cases):
        found = [gaps(case, folder) for case in cases if case.sharing == sharing]
        losses, weights = (max(column) for column in zip(*found, strict=True))
        print(f"| {sharing} | {len(found)} | {losses:.1e} | {weights:.1e} |")


def gaps(case: Case, folder: Path) -> tuple[float, float]:
    """How far losses and weights are from those of one process."""
    reference, found = found_together(case.alone, folder), found_together(case, folder)
    return reference.loss_gap(found), reference.weight_gap(found)


def print_gaps(case: Case, folder: Path) -> None:
    """Print both."""
    losses, weights = gaps(case, folder)
    print(f"{case.name:50} {losses:.1e}  {weights:.1e}", flush=True)


if __name__ == "__main__":
    main()
