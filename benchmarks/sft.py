"""A LoRA fine-tuning beside transformers' own Trainer, TRL and LLaMA-Factory.

    python -m benchmarks.sft [--vocabulary 151936] [--trl PYTHON] [--llamafactory CLI]

Learns 64 rows in updates of 4 with LoRA of rank 16 on all linear layers, in float32, from random
weights in Qwen3's form. Every way runs in a process of its own, in turns, over the same model and
the same rows: short prompts, replies of 8 to 400 tokens as real instruction rows have them. Time is
that of the training loop, memory the most that the process ever held. `--trl` is the Python of an
environment with TRL, `--llamafactory` the command of one with LLaMA-Factory.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
SIZES = {
    6_400: dict(hidden_size=256, intermediate_size=768, num_attention_heads=4),
    151_936: dict(hidden_size=512, intermediate_size=1536, num_attention_heads=8),
}
UNUSED = ["<pad>", "<eos>", "<unk>"]
BATCH = 4


def main() -> None:
    """Make model and rows, run every way in turns, print the table."""
    options = parse_options()
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", options.vocabulary)
        write_rows(folder, options.rows, options.vocabulary)
        commands = make_commands(options, folder)
        found: dict[str, list[tuple[float, int]]] = {way: [] for way in commands}
        for _ in range(options.repeats):
            for way, command in commands.items():
                found[way].append(run_alone(command, folder))
                print(f"{way}: {found[way][-1][0]:.2f} s", file=sys.stderr, flush=True)
    print_results(found)


def parse_options() -> argparse.Namespace:
    """What to measure, and beside whom."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, choices=list(SIZES), default=151_936)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trl", type=Path)
    parser.add_argument("--llamafactory", type=Path)
    return parser.parse_args()


def save_model(folder: Path, vocabulary: int) -> None:
    """A model, and a tokenizer whose words are numbers: a text holds the tokens that it says."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = UNUSED + [str(number) for number in range(len(UNUSED), vocabulary)]
    tokenizer = Tokenizer(WordLevel({word: id for id, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=vocabulary,
        num_hidden_layers=4,
        num_key_value_heads=SIZES[vocabulary]["num_attention_heads"] // 2,
        head_dim=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        **SIZES[vocabulary],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_rows(folder: Path, number: int, vocabulary: int) -> None:
    """Rows of random tokens, their lengths as 64 real Chinese instruction rows have them."""
    lengths = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(number):
            prompt = min(60, max(4, round(math.exp(lengths.gauss(3.4, 0.4)))))
            reply = min(400, max(8, round(math.exp(lengths.gauss(4.5, 1.0)))))
            texts = (
                " ".join(str(lengths.randrange(len(UNUSED), vocabulary)) for _ in range(size))
                for size in (prompt, reply)
            )
            file.write(json.dumps(dict(zip(("prompt", "completion"), texts, strict=True))) + "\n")


def make_commands(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The command of each way."""
    own = [sys.executable, "-m", "benchmarks.sft_ours", str(folder)]
    commands = {way: [*own, way] for way in ("plain", "nlirg", "trainer")}
    if options.trl:
        commands["trl"] = [str(options.trl), str(ROOT / "benchmarks" / "sft_trl.py"), str(folder)]
    if options.llamafactory:
        recipe = write_llamafactory(folder)
        commands["llamafactory"] = [str(options.llamafactory), "train", str(recipe)]
    return commands


def write_llamafactory(folder: Path) -> Path:
    """The recipe of LLaMA-Factory for the same training."""
    columns = {"prompt": "prompt", "response": "completion"}
    info = {"rows": {"file_name": "rows.jsonl", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info), "utf-8")
    recipe = {
        "model_name_or_path": str(folder / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_target": "all",
        "dataset": "rows",
        "dataset_dir": str(folder),
        "template": "empty",
        "cutoff_len": 1024,
        "output_dir": str(folder / "llamafactory"),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "logging_steps": 100,
        "save_strategy": "no",
        "report_to": "none",
    }
    path = folder / "llamafactory.yaml"
    path.write_text(json.dumps(recipe), "utf-8")  # which is YAML too
    return path


def run_alone(command: list[str], folder: Path) -> tuple[float, int]:
    """Seconds of the training loop and the most bytes that the process held."""
    before = {path: path.stat().st_mtime for path in folder.glob("*/all_results.json")}
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as output:
        started = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        peak = 0
        while started.poll() is None:
            peak = max(peak, high_water(started.pid))
            time.sleep(0.02)
    text = log.read_text("utf-8")
    if started.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text[-3000:]}")
    for path in folder.glob("*/all_results.json"):
        if path.stat().st_mtime != before.get(path):
            return float(json.loads(path.read_text("utf-8"))["train_runtime"]), peak
    return float(text.rsplit("seconds of training: ", 1)[1].split()[0]), peak


def high_water(process: int) -> int:
    """The most bytes that a running process has held, 0 when it has just ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text("ascii")
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def print_results(found: dict[str, list[tuple[float, int]]]) -> None:
    """Medians, and ours over each; ratios are of runs that followed each other."""
    print(f"{'way':>16} {'seconds':>8} {'peak GB':>8} {'time of ours':>13} {'memory of ours':>15}")
    for way, runs in found.items():
        seconds, peaks = zip(*runs, strict=True)
        pairs = zip(found["plain"], runs, strict=True)
        ratios = [(own[0] / one[0], own[1] / one[1]) for own, one in pairs]
        times, memories = zip(*ratios, strict=True)
        print(
            f"{way:>16} {statistics.median(seconds):8.2f} {statistics.median(peaks) / 1e9:8.2f}"
            f" {statistics.median(times):13.2f} {statistics.median(memories):15.2f}"
        )


if __name__ == "__main__":
    main()
