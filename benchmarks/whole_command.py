"""How long does a whole training command take, as a user starts it, beside TRL and LLaMA-Factory?

    python -m benchmarks.whole_command MODEL [--rows 128] [--tokens 64]
                                       [--trl TRL] [--llamafactory CLI]

MODEL is a folder of Hugging Face, such as the one that `yrun train recipes/port_sft.yaml` leaves
in `outputs/.bases`. Each tool trains LoRA of rank 16 on all linear layers in float32 for one epoch
in batches of 4, on the same rows, and is otherwise as it comes. In turns: the time of the command,
that of its training loop as the tool reports it, and the peak memory of the process. `--trl` and
`--llamafactory` take the commands `trl` and `llamafactory-cli` of other environments.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.markdown import print_markdown
from benchmarks.paths import ROOT, TOY_DATA
from benchmarks.peak_memory import peak_bytes
from benchmarks.sft.__main__ import write_llamafactory_recipe

SOURCES = ("port_train.jsonl", "port_keep.jsonl")
TOKENS_OF_TEMPLATE = 35
"""Of a chat template with its default system message."""
TOKENS_PER_WORD = 1.3


@dataclass(frozen=True)
class Measured:
    """One command: seconds from start to end, seconds of its loop, and peak bytes."""

    whole: float
    loop: float
    peak: int


def main() -> None:
    """Write rows, run the tools in turns, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a row, about")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--trl", type=Path)
    parser.add_argument("--llamafactory", type=Path)
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, options.rows, options.tokens)
        commands = make_commands(folder, options)
        measured: dict[str, list[Measured]] = {tool: [] for tool in commands}
        for _ in range(options.rounds):
            for tool, command in commands.items():
                measured[tool].append(run(command, folder))
                print(tool, measured[tool][-1], file=sys.stderr, flush=True)
    title = f"{options.rows} rows of about {options.tokens} tokens, {options.model.name}"
    columns = ("tool", "command, s", "ours / it", "loop, s", "ours / it", "memory, GB", "ours / it")
    print_markdown(title, columns, [row_of(tool, measured) for tool in measured])


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


def make_commands(folder: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each tool, with its settings beside the rows."""
    model, longest = options.model.resolve(), max(128, 2 * options.tokens)
    recipe = {
        "name": "whole",
        "output": str(folder / "ours"),
        "model": {"base": str(model), "dtype": "float32"},
        "tuning": {"kind": "lora", "rank": 16, "alpha": 32},
        "data": {"max_length": longest, "train": [{"file": "rows.jsonl"}]},
        "train": {"epochs": 1, "batch_size": 4, "learning_rate": 1e-4},
    }
    (folder / "ours.yaml").write_text(json.dumps(recipe), "utf-8")  # JSON is YAML
    yrun = [sys.executable, "-c", "from yrunner.cli import main; main()"]
    commands = {"yrunner": [*yrun, "train", str(folder / "ours.yaml"), "--overwrite"]}
    if options.llamafactory:
        theirs = write_llamafactory_recipe(folder, model, longest=longest, template="default")
        commands["LLaMA-Factory"] = [str(options.llamafactory.absolute()), "train", str(theirs)]
    if options.trl:
        (folder / "rows").mkdir()
        (folder / "rows" / "train.jsonl").symlink_to(folder / "rows.jsonl")
        settings = {
            "model_name_or_path": model,
            "dtype": "float32",
            "dataset_name": folder / "rows",
            "use_peft": True,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_target_modules": "all-linear",
            "max_length": longest,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "learning_rate": 1e-4,
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "report_to": "none",
            "output_dir": folder / "trl",
        }
        named = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        commands["TRL"] = [str(options.trl.absolute()), "sft", *named]
    return commands


def run(command: list[str], folder: Path) -> Measured:
    """Run a command in the folder of its rows."""
    log = folder / "log.txt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    if command[0] == sys.executable:
        environment["PYTHONPATH"] = str(ROOT)
    peak, began = 0, time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        while process.poll() is None:
            peak = max(peak, *map(peak_bytes, family(process.pid)))
            time.sleep(0.1)
    whole = time.perf_counter() - began
    text = log.read_text("utf-8")
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text[-3000:]}")
    reported = re.findall(r"'?train_runtime'?\W+([\d.:]+)", text)
    return Measured(whole, in_seconds(reported[-1]) if reported else our_loop(folder), peak)


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


def row_of(tool: str, measured: dict[str, list[Measured]]) -> list[str]:
    """Medians, and the median ratio of ours to it, round by round."""
    cells = [tool]
    for figure, unit in (("whole", 1.0), ("loop", 1.0), ("peak", 1e9)):
        own = [getattr(each, figure) for each in measured["yrunner"]]
        its = [getattr(each, figure) for each in measured[tool]]
        ratio = statistics.median(one / other for one, other in zip(own, its, strict=True))
        digits = 2 if figure == "peak" else 1
        cells.append(f"{statistics.median(its) / unit:.{digits}f}")
        cells.append("" if tool == "yrunner" else f"{ratio:.2f}")
    return cells


if __name__ == "__main__":
    main()
