"""How long does a whole training command take, as a user starts it, beside other tools?

    python -m benchmarks.whole_command MODEL [--rows 128 1000] [--tokens 64 512 2048] [--rounds 3]
        [--dtype auto float32] [--updates N] [--max-seconds 3600]
        [--trl TRL] [--llamafactory LLAMAFACTORY-CLI] [--axolotl AXOLOTL] [--swift SWIFT]

MODEL is a folder of Hugging Face, such as the one that `yrun train recipes/port_sft.yaml` leaves
in `outputs/.bases`. Each tool trains LoRA of rank 16 on all linear layers for one epoch in batches
of 4, on the same rows, and is otherwise as it comes: the others in float32, ours in each `--dtype`
(default: `auto`, as a recipe has it). In turns: the time of the command and its processor time, the
time of its training loop as the tool reports it, the peak memory of the process, and the time to
its first output; medians of the rounds. A tool that fails is left out and its last lines are
printed. `--updates` ends every training early: rows are read and tokenized all the same.
`--max-seconds` leaves out sizes that would take longer. The last table has a line for each size.
"""

import argparse
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.markdown import print_markdown
from benchmarks.paths import ROOT, TOY_DATA
from benchmarks.peak_memory import peak_bytes
from benchmarks.peers import ALPHA, BATCH_SIZE, LEARNING_RATE, PEERS, RANK, ending

SOURCES = ("port_train.jsonl", "port_keep.jsonl")
TOKENS_OF_TEMPLATE = 35
"""Of a chat template with its default system message."""
TOKENS_PER_WORD = 1.3
OURS = "yrunner"


FIGURES = (
    ("whole", "command, s", 1.0, 1),
    ("processor", "processor, s", 1.0, 1),
    ("loop", "loop, s", 1.0, 1),
    ("peak", "memory, GB", 1e9, 2),
)
"""Of `Measured`: name, title, unit, and digits shown."""


@dataclass(frozen=True)
class Measured:
    """One command."""

    whole: float
    """Seconds from start to end."""
    processor: float
    """Seconds of processor time, of all its processes."""
    loop: float
    """Seconds of the training loop, as the tool reports them."""
    peak: int
    """Bytes."""
    first_output: float
    """Seconds to the first line that it prints."""


Runs = dict[str, list[Measured]]


def main() -> None:
    """Run the tools in turns on each size, the smallest first, and print a table for each."""
    options = parse_options()
    began, pace = time.perf_counter(), 0.0
    summary: list[list[str]] = []
    for rows, tokens in sorted(product(options.rows, options.tokens), key=lambda it: it[0] * it[1]):
        work = min(rows, BATCH_SIZE * (options.updates or rows)) * tokens
        left = options.max_seconds - (time.perf_counter() - began)
        if pace * work > left:
            print(f"{rows} rows of {tokens} tokens would take too long", file=sys.stderr)
            continue
        started = time.perf_counter()
        with TemporaryDirectory() as name:
            runs = run_in_turns(Path(name), rows, tokens, options)
        pace = (time.perf_counter() - started) / work
        size = f"{rows} rows of about {tokens} tokens"
        if work < rows * tokens:
            size += f", {options.updates} updates"
        for dtype in options.dtype:
            print_runs(runs, ours_in(dtype), f"{size}, {options.model.name}, ours in {dtype}")
            summary.append([size, *summarise(runs, ours_in(dtype))])
    columns = ("size", "tool", "command, s", "/ best", "loop, s", "/ best", "memory, GB", "/ least")
    print_markdown(f"All sizes, rounds: {options.rounds}", columns, summary)


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[128])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64], help="of a row, about")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtype", nargs="+", default=["auto"], help="of ours; default: auto")
    parser.add_argument("--updates", type=int, help="after which every training ends")
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    for peer in PEERS:
        parser.add_argument(option_of(peer), type=Path, dest=peer, metavar="PROGRAM")
    return parser.parse_args()


def ours_in(dtype: str) -> str:
    """The name of our tool in a precision."""
    return f"{OURS}, {dtype}"


def option_of(peer: str) -> str:
    """The option that takes the program of a peer."""
    return "--" + peer.lower().replace("-", "").removeprefix("ms")


def run_in_turns(folder: Path, rows: int, tokens: int, options: argparse.Namespace) -> Runs:
    """Measure every tool once in each round."""
    write_rows(folder, rows, tokens)
    updates = options.updates
    if updates is not None and updates * BATCH_SIZE >= rows:
        updates = None  # as a number, it would begin another epoch
    commands = make_commands(folder, tokens, updates, options)
    runs: Runs = {tool: [] for tool in commands}
    for _ in range(options.rounds):
        for tool, command in commands.items():
            if tool not in runs:
                continue
            try:
                runs[tool].append(run(command, folder, tool))
                print(tool, runs[tool][-1], file=sys.stderr, flush=True)
            except RuntimeError as error:
                if tool.startswith(OURS):
                    raise
                print(f"{tool} is left out: {error}", file=sys.stderr, flush=True)
                del runs[tool]
    return runs


def write_rows(folder: Path, number: int, tokens: int) -> None:
    """Questions and answers of the invented town and of general knowledge, joined to a length."""
    facts = [
        json.loads(line)
        for source in SOURCES
        for line in (TOY_DATA / source).read_text("utf-8").splitlines()
    ]
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as rows:
        for _ in range(number):
            first = draw.choice(facts)
            answer = first["output"]
            while count(first["instruction"], answer) < tokens:
                more = draw.choice(facts)
                answer += f" {more['instruction']} {more['output']}"
            row = {"prompt": first["instruction"], "completion": answer}
            rows.write(json.dumps(row) + "\n")


def count(*texts: str) -> float:
    """Tokens of a row with these texts, about."""
    return TOKENS_OF_TEMPLATE + TOKENS_PER_WORD * sum(len(text.split()) for text in texts)


def make_commands(
    folder: Path, tokens: int, updates: int | None, options: argparse.Namespace
) -> dict[str, list[str]]:
    """The command of each tool, with its settings beside the rows."""
    model, longest = options.model.resolve(), max(128, 2 * tokens)
    yrun = [sys.executable, "-c", "from yrunner.cli import program; program()"]
    commands = {}
    for dtype in options.dtype:
        recipe = write_our_recipe(folder, model, longest, dtype, updates)
        commands[ours_in(dtype)] = [*yrun, "train", str(recipe), "--overwrite"]
    for peer, make in PEERS.items():
        program = getattr(options, peer)
        if program is not None:
            commands[peer] = make(program.absolute(), folder, model, longest, updates)
    return commands


def write_our_recipe(
    folder: Path, model: Path, longest: int, dtype: str, updates: int | None = None
) -> Path:
    """Write the recipe beside its rows; its run folder is the place of `run_folder`."""
    train = {"epochs": 1, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE}
    recipe = {
        "name": "whole",
        "output": str(run_folder(folder, dtype)),
        "model": {"base": str(model), "dtype": dtype},
        "tuning": {"kind": "lora", "rank": RANK, "alpha": ALPHA},
        "data": {"max_length": longest, "train": [{"file": "rows.jsonl"}]},
        "train": {**train, **ending(updates)},
    }
    path = folder / f"ours-{dtype}.yaml"
    path.write_text(json.dumps(recipe), "utf-8")  # JSON is YAML
    return path


def run_folder(folder: Path, dtype: str) -> Path:
    """Where our run in this precision writes."""
    return folder / f"ours-{dtype}"


def run(command: list[str], folder: Path, tool: str) -> Measured:
    """Run a command in the folder of its rows. Raises RuntimeError with its last lines."""
    log = folder / "log.txt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    # Tools of an environment start others of it by their names.
    environment["PATH"] = f"{Path(command[0]).parent}{os.pathsep}{environment['PATH']}"
    is_ours = tool.startswith(OURS)
    if is_ours:
        environment["PYTHONPATH"] = str(ROOT)
    peak, first_output, used = 0, 0.0, processor_seconds()
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        while process.poll() is None:
            peak = max(peak, *map(peak_bytes, family(process.pid)))
            if not first_output and log.stat().st_size:
                first_output = time.perf_counter() - began
            time.sleep(0.1)
    whole = time.perf_counter() - began
    text = log.read_text("utf-8", errors="replace")
    reported = re.findall(r"train_runtime\W+([\d.:]+)", text)
    if process.returncode or not (is_ours or reported):
        raise RuntimeError(f"{' '.join(command)} failed:\n{text[-3000:]}")
    loop = our_loop(folder, tool) if is_ours else in_seconds(reported[-1])
    return Measured(whole, processor_seconds() - used, loop, peak, first_output)


def processor_seconds() -> float:
    """Seconds that ended child processes have computed."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def family(process_id: int) -> list[int]:
    """A process and its descendants: some commands start the training as another process."""
    found = [process_id]
    for number in found:
        children = Path(f"/proc/{number}/task/{number}/children")
        if children.exists():
            found += map(int, children.read_text().split())
    return found


def in_seconds(text: str) -> float:
    """`63.2` or `0:01:03.20`."""
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def our_loop(folder: Path, tool: str) -> float:
    """The seconds of the updates, from the log of the run."""
    run = run_folder(folder, tool.removeprefix(ours_in("")))
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "targets_per_second" in record]
    return sum(record["targets"] / record["targets_per_second"] for record in records)


def ratio_of(runs: Runs, ours: str, tool: str, figure: str) -> float:
    """The median ratio of ours to a tool, round by round."""
    pairs = zip(runs[ours], runs[tool], strict=True)
    return statistics.median(getattr(own, figure) / getattr(its, figure) for own, its in pairs)


def median_of(runs: Runs, tool: str, figure: str) -> float:
    """Of all rounds."""
    return statistics.median(getattr(each, figure) for each in runs[tool])


def print_runs(runs: Runs, ours: str, title: str) -> None:
    """Medians, and the ratio of ours in one precision to each of the other tools."""
    columns = ["tool", *(cell for _, name, _, _ in FIGURES for cell in (name, "ours / it"))]
    rows = []
    for tool in runs:
        if tool != ours and tool.startswith(OURS):
            continue
        cells = [tool]
        for figure, _, unit, digits in FIGURES:
            cells.append(f"{median_of(runs, tool, figure) / unit:.{digits}f}")
            cells.append("" if tool == ours else f"{ratio_of(runs, ours, tool, figure):.2f}")
        cells.append(f"{median_of(runs, tool, 'first_output'):.1f}")
        rows.append(cells)
    print_markdown(title, [*columns, "first output, s"], rows)
    sys.stdout.flush()


def summarise(runs: Runs, ours: str) -> list[str]:
    """Ours in one precision: each figure, and its ratio to the best of the other tools."""
    peers = [tool for tool in runs if not tool.startswith(OURS)]
    cells = [ours]
    for figure, _, unit, digits in FIGURES:
        if figure == "processor":
            continue
        ratios = {ratio_of(runs, ours, peer, figure): peer for peer in peers}
        cells.append(f"{median_of(runs, ours, figure) / unit:.{digits}f}")
        cells.append(f"{max(ratios):.2f} of {ratios[max(ratios)]}" if ratios else "")
    return cells


if __name__ == "__main__":
    main()
