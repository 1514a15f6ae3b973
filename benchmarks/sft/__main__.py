"""How fast is LoRA fine-tuning, compared with transformers' Trainer, TRL and LLaMA-Factory?

    python -m benchmarks.sft [--vocabulary 151936] [--trl PYTHON] [--llamafactory CLI]

Trains LoRA of rank 16 on all linear layers on 64 rows in batches of 4, in float32, from a Qwen3
model of random weights. Each trainer runs in a separate process, in turns, on the same model and
the same rows: short prompts, replies of 8 to 400 tokens, like real instruction rows. Reports the
time of the training loop and the peak memory of the process. `--trl` takes the Python of an
environment with TRL, `--llamafactory` the `llamafactory-cli` of one with LLaMA-Factory.
"""

import argparse
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.in_turns import Runs, run_alone
from benchmarks.paths import ROOT
from benchmarks.peers import write_llamafactory_recipe
from benchmarks.sft.inputs import SIZES, save_model, write_rows


def main() -> None:
    """Make model and rows, run the trainers in turns, print the table."""
    options = parse_options()
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", options.vocabulary)
        write_rows(folder, options.rows, options.vocabulary)
        commands = make_commands(options, folder)
        runs: Runs = {trainer: [] for trainer in commands}
        for _ in range(options.repeats):
            for trainer, command in commands.items():
                runs[trainer].append(run_alone(command, folder))
                print(f"{trainer}: {runs[trainer][-1][0]:.2f} s", file=sys.stderr, flush=True)
    print_results(runs)


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, choices=list(SIZES), default=151_936)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trl", type=Path)
    parser.add_argument("--llamafactory", type=Path)
    return parser.parse_args()


def make_commands(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Build the command of each trainer."""
    ours = [sys.executable, "-m", "benchmarks.sft.ours", str(folder)]
    commands = {trainer: [*ours, trainer] for trainer in ("plain", "nlirg", "trainer")}
    if options.trl:
        program = ROOT / "benchmarks" / "sft" / "with_trl.py"
        commands["trl"] = [str(options.trl), str(program), str(folder)]
    if options.llamafactory:
        quiet = {"logging_steps": 100, "save_strategy": "no"}
        recipe = write_llamafactory_recipe(folder, template="empty", **quiet)
        commands["llamafactory"] = [str(options.llamafactory), "train", str(recipe)]
    return commands


def print_results(runs: Runs) -> None:
    """Print medians, and the median ratio of our plain loss to each trainer, round by round."""
    print(f"{'trainer':>16} {'seconds':>8} {'peak GB':>8} {'time ratio':>11} {'memory ratio':>13}")
    for trainer, figures in runs.items():
        seconds, peaks = zip(*figures, strict=True)
        pairs = zip(runs["plain"], figures, strict=True)
        ratios = [(ours[0] / theirs[0], ours[1] / theirs[1]) for ours, theirs in pairs]
        times, memories = zip(*ratios, strict=True)
        print(
            f"{trainer:>16} {statistics.median(seconds):8.2f}"
            f" {statistics.median(peaks) / 1e9:8.2f}"
            f" {statistics.median(times):11.2f} {statistics.median(memories):13.2f}"
        )


if __name__ == "__main__":
    main()
