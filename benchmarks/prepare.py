"""Rows per second and peak memory of preparing data: ours, TRL's, and a plain `datasets.map`.

    python benchmarks/prepare.py [--data rows.json --tokenizer folder] [--rows 20000] [--beside trl]

Every way runs in a process of its own, over the same file: rows are read, rendered, tokenized,
masked and packed to 1,024 tokens. `--data` holds alpaca rows; by default rows of the toy world and
a tokenizer trained on them. A number is appended to each answer, so that no two rows are equal.
`--beside trl` needs `pip install trl`, `--beside map` needs `pip install datasets`.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parent.parent
TOY_ROWS = ROOT / "recipes" / "data" / "legal_train.jsonl"
MAX_LENGTH = 1024
NUM_PROCESSES = 2


def main() -> None:
    """Make the data, run each way in its own process, print the table."""
    options = parse_options()
    if options.only:
        WAYS[options.only](options)
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / f"rows.{options.kind}"
        write_rows(options, data)
        tokenizer = options.tokenizer or save_toy_tokenizer(folder / "tokenizer")
        results = {
            way: run_alone(way, data, tokenizer, folder) for way in ["ours", *options.beside]
        }
    print_results(results, options.rows)


def parse_options() -> argparse.Namespace:
    """What to measure, and with whom to compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=TOY_ROWS)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--kind", choices=["jsonl", "json"], default="jsonl")
    parser.add_argument("--beside", nargs="*", choices=["trl", "map"], default=[])
    parser.add_argument("--only", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_rows(options: argparse.Namespace, path: Path) -> None:
    """Write as many rows as asked for, one at a time: a million must not fill the memory here."""
    text = options.data.read_text("utf-8")
    is_array = options.data.suffix == ".json"
    rows = json.loads(text) if is_array else list(map(json.loads, text.splitlines()))
    with path.open("w", encoding="utf-8") as file:
        file.write("[" if options.kind == "json" else "")
        for number in range(options.rows):
            row = rows[number % len(rows)]
            row = row | {"output": f"{row['output']} {number}"}
            comma = "," if options.kind == "json" and number else ""
            file.write(f"{comma}{json.dumps(row, ensure_ascii=False)}\n")
        file.write("]" if options.kind == "json" else "")


def save_toy_tokenizer(folder: Path) -> Path:
    """A tokenizer of 2,000 entries, trained on the toy rows."""
    from yrunner.models.scratch import train_tokenizer

    rows = map(json.loads, TOY_ROWS.read_text("utf-8").splitlines())
    train_tokenizer([value for row in rows for value in row.values()], 2000).save_pretrained(folder)
    return folder


def run_alone(way: str, data: Path, tokenizer: Path, folder: Path) -> dict[str, float]:
    """Run one way in a new process; it prints its figures as JSON on the last line."""
    command = [sys.executable, __file__, "--only", way, "--data", str(data)]
    command += ["--tokenizer", str(tokenizer), "--folder", str(folder / way)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def ours(options: argparse.Namespace) -> None:
    """yrunner: prepared into a cache on disk, then packed."""
    from transformers import AutoTokenizer

    from yrunner.data.batching.packing import pack
    from yrunner.data.dataset.cache import Cache
    from yrunner.data.dataset.prepare import Rules, Source, prepare

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    source = Source((options.data,))
    rules = Rules(max_length=MAX_LENGTH, too_long="cut")

    def work() -> tuple[int, int]:
        prepared = prepare([source], tokenizer, rules, Cache(options.folder))
        packs = pack(prepared.train.lengths, MAX_LENGTH)
        return len(prepared.train), len(packs)

    report(work)


def trl(options: argparse.Namespace) -> None:
    """TRL's SFTTrainer: rows as prompt and completion, loss on the completion, packed."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    config = Qwen3Config(
        vocab_size=len(tokenizer), num_attention_heads=2, num_key_value_heads=2, **sizes
    )
    arguments = SFTConfig(
        output_dir=str(options.folder),
        max_length=MAX_LENGTH,
        packing=True,
        completion_only_loss=True,
        dataset_num_proc=NUM_PROCESSES,
        bf16=False,
        use_cpu=True,
        report_to=[],
    )
    model = Qwen3ForCausalLM(config)

    def work() -> tuple[int, int]:
        rows = load_messages(options)
        trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
        return len(rows), len(trainer.train_dataset)

    report(work)


def plain_map(options: argparse.Namespace) -> None:
    """`datasets.map` over `apply_chat_template`: tokens only, neither masked nor packed."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer.apply_chat_template(row["prompt"] + row["completion"])}

    def work() -> tuple[int, int]:
        rows = load_messages(options)
        return len(rows.map(tokenize, num_proc=NUM_PROCESSES)), 0

    report(work)


def load_messages(options: argparse.Namespace) -> Any:
    """The file as a dataset of prompts and completions, read and turned over by `datasets`."""
    from datasets import load_dataset

    def as_messages(row: dict[str, Any]) -> dict[str, Any]:
        question = "\n".join(filter(None, [row["instruction"], row.get("input")]))
        return {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }

    cache = str(options.folder / "datasets")
    rows = load_dataset("json", data_files=str(options.data), split="train", cache_dir=cache)
    return rows.map(as_messages, remove_columns=rows.column_names, num_proc=NUM_PROCESSES)


WAYS: dict[str, Callable[[argparse.Namespace], None]] = {"ours": ours, "trl": trl, "map": plain_map}


def report(work: Callable[[], tuple[int, int]]) -> None:
    """Time the work and print its figures; memory is that of this process and of its children."""
    before = peak_bytes()
    start = time.perf_counter()
    rows, packs = work()
    seconds = time.perf_counter() - start
    peak = peak_bytes()
    print(
        json.dumps(
            {"seconds": seconds, "rows": rows, "packs": packs, "before": before, "peak": peak}
        )
    )


def peak_bytes() -> int:
    """Largest resident memory so far of this process, or of the largest of its children."""
    status = Path("/proc/self/status").read_text("ascii")
    own = int(status.split("VmHWM:")[1].split()[0])
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024


def print_results(results: dict[str, dict[str, float]], num_rows: int) -> None:
    """One line for each way, with the time as a ratio to ours."""
    print(f"{num_rows:,} rows, packed to {MAX_LENGTH:,} tokens")
    print(
        f"{'':6}{'seconds':>9}{'rows/s':>10}{'ratio':>7}{'packs':>8}{'peak MB':>9}{'at start':>10}"
    )
    for line in lines(results):
        print(line)


def lines(results: dict[str, dict[str, float]]) -> Iterator[str]:
    """The table's lines."""
    for way, it in results.items():
        ratio = it["seconds"] / results["ours"]["seconds"]
        yield (
            f"{way:6}{it['seconds']:9.2f}{it['rows'] / it['seconds']:10,.0f}{ratio:7.2f}"
            f"{it['packs']:8,.0f}{it['peak'] / 1e6:9,.0f}{it['before'] / 1e6:10,.0f}"
        )


if __name__ == "__main__":
    main()
