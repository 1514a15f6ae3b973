"""Do two processes learn the same as one?

    python -m benchmarks.ranks                        # all combinations
    python -m benchmarks.ranks ddp zero3              # only these ways of sharing
    python -m benchmarks.ranks --pairs                # half of the combinations, all pairs covered
    python -m benchmarks.ranks --folder outputs/ranks # resumes an interrupted run

Two processes train a tiny model over gloo with DDP and with DeepSpeed ZeRO 1, 2 and 3, with and
without CPU offload. One process with twice the micro-steps runs the same updates: the losses of
each step and the final weights must be equal.
"""

import argparse
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from benchmarks.ranks.cases import LOSSES, ROWS, SHARINGS, TUNINGS, Case, write_base
from benchmarks.ranks.training import load_result, save_result, start_processes, train_case


def matrix(sharings: Sequence[str], *, pairs: bool = False) -> list[Case]:
    """Return every combination; with `pairs`, half of them, covering every pair of values."""
    cases = [Case(*parts) for parts in product(sharings, LOSSES, ROWS, TUNINGS)]
    return [case for case in cases if not pairs or _parity(case) % 2 == 0]


def _parity(case: Case) -> int:
    """Return a number whose parity changes with every step along one axis of the matrix."""
    chosen = ((LOSSES, case.loss), (ROWS, case.rows), (TUNINGS, case.tuning))
    return sum(list(options).index(value) for options, value in chosen)


def main() -> None:
    """Print the gaps of each case as it ends, then the largest gaps of each way of sharing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sharings", nargs="*", choices=[[], *SHARINGS], help="default: all")
    parser.add_argument(
        "--folder", type=Path, help="store results here, and skip cases that have one"
    )
    parser.add_argument("--pairs", action="store_true", help="run half of the combinations")
    options = parser.parse_args()
    sharings = options.sharings or list(SHARINGS)
    with tempfile.TemporaryDirectory() as name:
        compare_all(matrix(sharings, pairs=options.pairs), options.folder or Path(name))


def compare_all(cases: Sequence[Case], folder: Path) -> None:
    """Train the cases without a result in `folder`, and print their gaps to one process."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        write_base(folder / "base")
    for case in dict.fromkeys(case.alone for case in cases):
        if not case.result_file(folder).exists():
            save_result(train_case(case, folder), case, folder)
    missing = [case for case in cases if not case.result_file(folder).exists()]
    if missing:
        start_processes(missing, folder, report=print_gaps)
    print("| | cases | losses | weights |\n|---|---|---|---|")
    for sharing in dict.fromkeys(case.sharing for case in cases):
        gaps_of_sharing = [gaps(case, folder) for case in cases if case.sharing == sharing]
        losses, weights = (max(column) for column in zip(*gaps_of_sharing, strict=True))
        print(f"| {sharing} | {len(gaps_of_sharing)} | {losses:.1e} | {weights:.1e} |")


def gaps(case: Case, folder: Path) -> tuple[float, float]:
    """Return the gaps of losses and of weights to those of one process."""
    reference, result = load_result(case.alone, folder), load_result(case, folder)
    return reference.loss_gap(result), reference.weight_gap(result)


def print_gaps(case: Case, folder: Path) -> None:
    """Print the gaps of losses and weights of a case."""
    losses, weights = gaps(case, folder)
    print(f"{case.name:50} {losses:.1e}  {weights:.1e}", flush=True)


if __name__ == "__main__":
    main()
