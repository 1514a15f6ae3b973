"""How long does a whole training command take, as a user starts it, beside other tools?

    python -m benchmarks.whole_command MODEL [--rows 128 1000] [--tokens 64 512 2048] [--rounds 3]
        [--trl TRL] [--llamafactory LLAMAFACTORY-CLI] [--axolotl AXOLOTL] [--swift SWIFT]
        [--max-seconds 3600]

MODEL is a folder of Hugging Face, such as the one that `yrun train recipes/port_sft.yaml` leaves
in `outputs/.bases`. Each tool trains LoRA of rank 16 on all linear layers in float32 for one epoch
in batches of 4, on the same rows, and is otherwise as it comes; `--dtype` changes ours alone. In
turns: the time of the command and its processor time, the time of its training loop as the tool
reports it, the peak memory of the process, and the time to its first output. A tool that fails is
left out and its last lines are printed. `--max-seconds` leaves out sizes that would take longer.
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
from benchmarks.peers import ALPHA, BATCH_SIZE, LEARNING_RATE, PEERS, RANK

SOURCES = ("port_train.jsonl", "port_keep.jsonl")
TOKENS_OF_TEMPLATE = 35
"""Of a chat template with its default system message."""
TOKENS_PER_WORD = 1.3
OURS = "yrunner"


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
    for rows, tokens in sorted(product(options.rows, options.tokens), key=lambda it: it[0] * it[1]):
        left = options.max_seconds - (time.perf_counter() - began)
        if pace * rows * tokens > left:
            print(f"{rows} rows of {tokens} tokens would take too long", file=sys.stderr)
            continue
        started = time.perf_counter()
        with TemporaryDirectory() as name:
            runs = run_in_turns(Path(name), rows, tokens, options)
        pace = (time.perf_counter() - started) / (rows * tokens)
        print_runs(runs, f"{rows} rows of about {tokens} tokens, {options.model.name}")


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[128])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64], help="of a row, about")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtype", default="float32", help="of ours; default: float32")
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    for peer in PEERS:
        parser.add_argument(option_of(peer), type=Path, dest=peer, metavar="PROGRAM")
    return parser.parse_args()


def option_of(peer: str) -> str:
    """The option that takes the program of a peer."""
    return "--" + peer.lower().replace("-", "").removeprefix("ms")


def run_in_turns(folder: Path, rows: int, tokens: int, options: argparse.Namespace) -> Runs:
    """Measure every tool once in each round."""
    write_rows(folder, rows, tokens)
    commands = make_commands(folder, tokens, options)
    runs: Runs = {tool: [] for tool in commands}
    for _ in range(options.rounds):
        for tool, command in commands.items():
            if tool not in runs:
                continue
            try:
                runs[tool].append(run(command, folder, tool))
                print(tool, runs[tool][-1], file=sys.stderr, flush=True)
            except RuntimeError as error:
                if tool == OURS:
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


def make_commands(folder: Path, tokens: int, options: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each tool, with its settings beside the rows."""
    model, longest = options.model.resolve(), max(128, 2 * tokens)
    recipe = write_our_recipe(folder, model, longest, options.dtype)
    yrun = [sys.executable, "-c", "from yrunner.cli import main; main()"]
    commands = {OURS: [*yrun, "train", str(recipe), "--overwrite"]}
    for peer, make in PEERS.items():
        program = getattr(options, peer)
        if program is not None:
            commands[peer] = make(program.absolute(), folder, model, longest)
    return commands


def write_our_recipe(folder: Path, model: Path, longest: int, dtype: str) -> Path:
    """Write the recipe beside its rows."""
    recipe = {
        "name": "whole",
        "output": str(folder / "ours"),
        "model": {"base": str(model), "dtype": dtype},
        "tuning": {"kind": "lora", "rank": RANK, "alpha": ALPHA},
        "data": {"max_length": longest, "train": [{"file": "rows.jsonl"}]},
        "train": {"epochs": 1, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE},
    }
    path = folder / "ours.yaml"
    path.write_text(json.dumps(recipe), "utf-8")  # JSON is YAML
    return path


def run(command: list[str], folder: Path, tool: str) -> Measured:
    """Run a command in the folder of its rows. Raises RuntimeError with its last lines."""
    log = folder / "log.txt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    # Tools of an environment start others of it by their names.
    environment["PATH"] = f"{Path(command[0]).parent}{os.pathsep}{environment['PATH']}"
    if tool == OURS:
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
    if process.returncode or (tool != OURS and not reported):
        raise RuntimeError(f"{' '.join(command)} failed:\n{text[-3000:]}")
    loop = our_loop(folder) if tool == OURS else in_seconds(reported[-1])
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


def our_loop(folder: Path) -> float:
    """The seconds of the updates, from the log of the run."""
    lines = (folder / "ours" / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "targets_per_second" in record]
    return sum(record["targets"] / record["targets_per_second"] for record in records)


def print_runs(runs: Runs, title: str) -> None:
    """Medians, and the median ratio of ours to each tool, round by round."""
    figures = (
        ("whole", "command, s", 1.0, 1),
        ("processor", "processor, s", 1.0, 1),
        ("loop", "loop, s", 1.0, 1),
        ("peak", "memory, GB", 1e9, 2),
    )
    columns = ["tool", *(cell for _, name, _, _ in figures for cell in (name, "ours / it"))]
    rows = []
    for tool, measured in runs.items():
        cells = [tool]
        for figure, _, unit, digits in figures:
            own = [getattr(each, figure) for each in runs[OURS]]
            its = [getattr(each, figure) for each in measured]
            ratio = statistics.median(one / other for one, other in zip(own, its, strict=True))
            cells.append(f"{statistics.median(its) / unit:.{digits}f}")
            cells.append("" if tool == OURS else f"{ratio:.2f}")
        cells.append(f"{statistics.median(each.first_output for each in measured):.1f}")
        rows.append(cells)
    print_markdown(title, [*columns, "first output, s"], rows)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
