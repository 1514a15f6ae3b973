"""What did each loss of a comparison of preferences teach, and what did it cost?

    yrun compare recipes/dpo_compare.yaml
    python -m benchmarks.preference_losses [outputs/dpo-compare]

Prints a row for each arm, the mean and the sample deviation over its seeds: the test pairs won by
likelihood and by reward, the field and the general questions whose answer contains the right one,
the length of the general answers in characters, their distance from the base, and the log
ratios of the last updates. Swapped test pairs count as they should be won.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.markdown import print_markdown
from benchmarks.paths import TOY_DATA
from yrunner.commands.compare.points import Measurement
from yrunner.evaluation.results import ModelResults
from yrunner.storage.run_dir import CompareDir, RunDir
from yrunner.training.metrics import read_metrics

COLUMNS = (
    "arm",
    "runs",
    "pairs",
    "articles",
    "rewards",
    "field",
    "general",
    "length",
    "KL",
    "better",
    "worse",
)
LAST_RECORDS = 3


def won(results: ModelResults, figure: str, kind: str | None = None) -> float | None:
    """The share of the test pairs that are won in percent; of one kind if it is named."""
    found = results.tasks["pairs"].per_question.get(figure)
    if found is None:
        return None
    lines = (TOY_DATA / "pairs_test.jsonl").read_text("utf-8").splitlines()
    flips = (TOY_DATA / "pairs_flips.jsonl").read_text("utf-8").splitlines()
    swapped = {json.loads(line)["row"] for line in flips}
    wins = [
        1 - win if row in swapped else win
        for row, (win, line) in enumerate(zip(found, lines, strict=True), start=1)
        if kind in (None, json.loads(line)["kind"])
    ]
    return 100 * fmean(wins)


def figures_of(results: ModelResults, run_dir: RunDir | None) -> list[float | None]:
    """The figures of one run, in the order of COLUMNS; of the base without a run."""
    legal, general = (results.tasks[name].figures for name in ("legal", "general"))
    records = [] if run_dir is None else read_metrics(run_dir.metrics)
    last = [row for row in records if "chosen_loss" in row][-LAST_RECORDS:]
    ratios = [
        fmean(row[f"{side}_log_ratio"] for row in last)
        if last and f"{side}_log_ratio" in last[0]
        else None
        for side in ("chosen", "rejected")
    ]
    return [
        won(results, "accuracy"),
        won(results, "accuracy", "article"),
        won(results, "reward_accuracy"),
        100 * legal["contains"],
        100 * general["contains"],
        general["length"],
        general["kl"],
        *ratios,
    ]


def cell(values: Sequence[float | None]) -> str | None:
    """Mean and sample deviation."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    spread = f" ± {stdev(found):.2g}" if len(found) > 1 else ""
    return f"{fmean(found):.3g}{spread}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs/dpo-compare"))
    folder = CompareDir(parser.parse_args().folder)
    arms: dict[str, list[list[float | None]]] = {}
    for path in sorted(folder.arms.iterdir()):
        name = "(base)" if path.name.startswith("base-") else path.name.rpartition("-seed-")[0]
        if path.suffix == ".log" or path.name == "replay":
            continue
        run_dir = RunDir(path) if path.is_dir() else None
        measured = Measurement.load(path if run_dir is None else run_dir.measured)
        if measured is not None and measured.points:
            arms.setdefault(name, []).append(figures_of(measured.points[-1].results, run_dir))
    rows = [
        (name, str(len(runs)), *(cell(values) for values in zip(*runs, strict=True)))
        for name, runs in arms.items()
    ]
    print_markdown("After the last update", COLUMNS, rows)


if __name__ == "__main__":
    main()
