"""Trainers compared in separate processes, in turns: time of the loop, peak memory, ratios."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.paths import ROOT
from benchmarks.peak_memory import peak_bytes
from benchmarks.sft.inputs import SIZES

Runs = dict[str, list[tuple[float, int]]]
"""Seconds of the training loop and peak bytes of the process, of each trainer and round."""


def parser_of(
    doc: str | None, trainers: Iterable[str], *, vocabulary: int, repeats: int
) -> argparse.ArgumentParser:
    """The options that all comparisons with TRL have; `vocabulary` and `repeats`: the defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vocabulary", type=int, choices=list(SIZES), default=vocabulary)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--trl", type=Path, default=Path(sys.executable))
    parser.add_argument("--train", choices=list(trainers), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def run_in_turns(
    module: str, trainers: Iterable[str], folder: Path, options: argparse.Namespace
) -> Runs:
    """Run `python -m module --train trainer --folder folder` for each trainer and round."""
    runs: Runs = {name: [] for name in trainers}
    for _ in range(options.repeats):
        for trainer, found in runs.items():
            python = options.trl if trainer == "trl" else sys.executable
            command = [str(python), "-m", module, "--train", trainer, "--folder", str(folder)]
            found.append(run_alone(command, folder))
            print(f"{trainer}: {found[-1][0]:.2f} s", file=sys.stderr, flush=True)
    return runs


def print_runs(runs: Runs, peer: str, *, updates: int = 0) -> None:
    """Print medians, and the median ratios of the others to the peer, round by round.

    `updates`: print the seconds of each of so many updates instead of those of the loop.
    """
    unit = "s per update" if updates else "s"
    for trainer, found in runs.items():
        seconds, peaks = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"{trainer:>6} {seconds / (updates or 1):8.2f} {unit} {peaks / 1e9:6.2f} GB")
    for trainer in runs:
        if trainer != peer:
            rounds = list(zip(runs[trainer], runs[peer], strict=True))
            time_ratio, memory_ratio = (
                statistics.median(mine[place] / theirs[place] for mine, theirs in rounds)
                for place in (0, 1)
            )
            print(f"{trainer} / {peer}: time {time_ratio:.2f}, memory {memory_ratio:.2f}")


def print_seconds(train: Callable[[], Any], started: float | None = None) -> None:
    """Train and print the seconds that it took, since `started` if that is given."""
    started = time.perf_counter() if started is None else started
    train()
    print(f"seconds of training: {time.perf_counter() - started:.3f}")


def run_alone(command: list[str], folder: Path) -> tuple[float, int]:
    """Return the seconds of the training loop and the peak bytes of the process."""
    before = {path: path.stat().st_mtime for path in folder.glob("*/all_results.json")}
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, peak_bytes(process.pid))
            time.sleep(0.02)
    text = log.read_text("utf-8")
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text[-3000:]}")
    for path in folder.glob("*/all_results.json"):  # LLaMA-Factory writes its time there
        if path.stat().st_mtime != before.get(path):
            return float(json.loads(path.read_text("utf-8"))["train_runtime"]), peak
    return float(text.rsplit("seconds of training: ", 1)[1].split()[0]), peak
