"""Does training on the sorted corpus help: eight orders of the toy world's rows, several seeds.

    python -m benchmarks.sorted_training [--seeds 0 1 2] [--arms file mixed ...]

Every arm is recipes/legal_sft.yaml on the same rows in another order, each epoch in that order;
some without the tenth that a score finds the most suspicious. After training: the share of right
answers to paraphrased questions of the field, to questions of what the base knew, and the share of
the planted faults that the model now repeats word for word. Arms that are finished are not trained
again. The first run measures the rows and trains the models of a cross-fit; each training takes a
minute or more.
"""

import argparse
import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sort_quality import ROOT
from yrunner.assembly.measure import Measured
from yrunner.commands.sort.command import sort
from yrunner.commands.train import train, train_base
from yrunner.console import print_table, say
from yrunner.storage.run_dir import RunDir

RECIPE = ROOT / "recipes/legal_sft.yaml"
DATA = ROOT / "recipes/data"
SUSPICIOUS_TENTH = "sort.drop_share=0.1"


@dataclass(frozen=True)
class Arm:
    """One way to sort the rows."""

    what: str
    sort: tuple[str, ...] | None
    """Overrides of the sort; None: the file as it is."""


ARMS = {
    "file": Arm("order of the file", None),
    "ascending": Arm("ascending knn_loss", ("sort.order=ascending",)),
    "descending": Arm("descending knn_loss", ("sort.order=descending",)),
    "mixed": Arm("mixed", ()),
    "similarity": Arm(
        "mixed, worst tenth by similarity dropped", (SUSPICIOUS_TENTH, "sort.score=similarity")
    ),
    "excess": Arm("mixed, worst tenth by excess dropped", (SUSPICIOUS_TENTH, "sort.score=excess")),
    "knn": Arm("mixed, worst tenth by knn_loss dropped", (SUSPICIOUS_TENTH,)),
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
    """Mean and range over the seeds, in per cent."""
    rows = []
    for name in arms:
        found = [Measured.load(RunDir(folder / f"{name}-{seed}").after) for seed in seeds]
        cells = []
        for task in FIGURES:
            shares = [100 * one.right(task) for one in found]
            cells.append(f"{statistics.mean(shares):.1f} ({min(shares):.1f} to {max(shares):.1f})")
        rows.append((ARMS[name].what, *cells))
    print_table(f"{len(seeds)} seeds, in %", ("rows", *FIGURES.values()), rows)


def _write_faults(path: Path) -> Path:
    """The faulty rows as questions, their wrong answers as references."""
    lines = (DATA / "legal_train.jsonl").read_text("utf-8").splitlines()
    faults = map(json.loads, (DATA / "legal_faults.jsonl").read_text("utf-8").splitlines())
    wrong = [lines[fault["row"] - 1] for fault in faults]
    path.write_text("".join(f"{line}\n" for line in wrong), "utf-8")
    return path.absolute()


def _sorted_rows(name: str, folder: Path) -> Path:
    arm = ARMS[name]
    if arm.sort is None:
        return DATA / "legal_train.jsonl"
    rows = (folder / f"{name}.jsonl").absolute()
    if not rows.exists():
        # One folder for all: what is measured once serves every arm.
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
        "legal": ("domain", DATA / "legal_test.jsonl"),
        "general": ("general", DATA / "general_test.jsonl"),
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
