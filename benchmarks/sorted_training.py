"""Does training on a sorted corpus help?

    python -m benchmarks.sorted_training [--seeds 0 1 2] [--arms file mixed ...]

Every arm trains recipes/legal_sft.yaml on the same rows in a different order, the same in each
epoch; some drop the tenth of the rows that a score finds most suspicious. After training, measures
the accuracy on paraphrased questions of the field, on general questions, and the share of planted
faults that the model repeats word for word. Finished arms are not trained again. The first run
scores the rows and trains the cross-fit models; each training takes a minute or more.
"""

import argparse
import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.paths import RECIPES, TOY_DATA
from yrunner.assembly.measure import Measured
from yrunner.commands.sort.command import sort
from yrunner.commands.train import train, train_base
from yrunner.console import print_table, say
from yrunner.storage.run_dir import RunDir

RECIPE = RECIPES / "legal_sft.yaml"
SUSPICIOUS_TENTH = "sort.drop_share=0.1"
KNN_LOSS = "sort.score=knn_loss"


@dataclass(frozen=True)
class Arm:
    """One way to sort the rows."""

    what: str
    sort: tuple[str, ...] | None
    """Overrides for `yrun sort`; None keeps the order of the file."""


ARMS = {
    "file": Arm("order of the file", None),
    "ascending": Arm("ascending knn_loss", ("sort.order=ascending", KNN_LOSS)),
    "descending": Arm("descending knn_loss", ("sort.order=descending", KNN_LOSS)),
    "mixed": Arm("mixed", (KNN_LOSS,)),
    "similarity": Arm(
        "mixed, worst tenth by similarity dropped", (SUSPICIOUS_TENTH, "sort.score=similarity")
    ),
    "excess": Arm("mixed, worst tenth by excess dropped", (SUSPICIOUS_TENTH, "sort.score=excess")),
    "knn": Arm("mixed, worst tenth by knn_loss dropped", (SUSPICIOUS_TENTH, KNN_LOSS)),
    "cross_fit": Arm(
        "mixed, worst tenth by cross-fit loss dropped",
        (SUSPICIOUS_TENTH, "sort.score=loss", "sort.cross_fit=3"),
    ),
}
FIGURES = {"legal": "domain", "general": "general", "faults": "memorised faults"}


def main() -> None:
    """Sort, train and print the table."""
    arguments = _parse()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    faults = _write_faults(folder / "faults.jsonl")
    for seed in arguments.seeds:
        for name in arguments.arms:
            rows = _sorted_rows(name, folder)
            _train(name, rows, faults, seed, folder)
    print_results(folder, arguments.arms, arguments.seeds)


def print_results(folder: Path, arms: list[str], seeds: list[int]) -> None:
    """Print mean and range over the seeds, in percent."""
    rows = []
    for name in arms:
        runs = [Measured.load(RunDir(folder / f"{name}-{seed}").after) for seed in seeds]
        cells = []
        for task in FIGURES:
            shares = [100 * run.score(task, "exact") for run in runs]
            cells.append(f"{statistics.mean(shares):.1f} ({min(shares):.1f} to {max(shares):.1f})")
        rows.append((ARMS[name].what, *cells))
    print_table(f"{len(seeds)} seeds, in %", ("rows", *FIGURES.values()), rows)


def _write_faults(path: Path) -> Path:
    """Write the faulty rows as questions, with their wrong answers as references."""
    lines = (TOY_DATA / "legal_train.jsonl").read_text("utf-8").splitlines()
    faults = map(json.loads, (TOY_DATA / "legal_faults.jsonl").read_text("utf-8").splitlines())
    wrong = [lines[fault["row"] - 1] for fault in faults]
    path.write_text("".join(f"{line}\n" for line in wrong), "utf-8")
    return path.absolute()


def _sorted_rows(name: str, folder: Path) -> Path:
    arm = ARMS[name]
    if arm.sort is None:
        return TOY_DATA / "legal_train.jsonl"
    rows = (folder / f"{name}.jsonl").absolute()
    if not rows.exists():
        # One folder for all arms, so that rows are scored once.
        overrides = [f"output={folder / 'sorted'}", *arm.sort]
        sort(RECIPE, overrides, overwrite=True, train_base=train_base)
        shutil.copyfile(folder / "sorted/sort/sorted.jsonl", rows)
    return rows


def _train(name: str, rows: Path, faults: Path, seed: int, folder: Path) -> None:
    output = folder / f"{name}-{seed}"
    run_dir = RunDir(output)
    if run_dir.is_finished() and run_dir.after.exists():
        return
    say(f"{ARMS[name].what}, seed {seed}")
    questions = {
        "legal": ("domain", TOY_DATA / "legal_test.jsonl"),
        "general": ("general", TOY_DATA / "general_test.jsonl"),
        "faults": ("domain", faults),
    }
    tasks = [
        {"kind": "answer", "name": task, "side": side, "data": str(path)}
        for task, (side, path) in questions.items()
    ]
    overrides = [
        f"output={output}",
        f"seed={seed}",
        f"data.train={json.dumps([{'file': str(rows)}])}",
        "train.order=as_written",
        f"eval.tasks={json.dumps(tasks)}",
    ]
    train(RECIPE, overrides, resume=False, overwrite=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("outputs/sorted-training"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
