"""How much time and memory does a merge take, compared with peft? python -m benchmarks.merge

Merges an adapter into a model of 2 GB with yrunner, without and with the proof, and with peft.
Each runs in a separate process, once without a limit and once with --limit gigabytes of data
memory, where a merge that needs more fails. Memory is the peak of the process, interpreter and
libraries included.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.peak_memory import peak_bytes
from yrunner.machine import lower_mmap_threshold
from yrunner.models.merge.plan import WeightedAdapter, prepare_merge
from yrunner.models.merge.proof import Probes, compare, folder_logits, merge_logits
from yrunner.models.merge.safetensors_io import open_checkpoint
from yrunner.models.merge.write import write_merged

GIGABYTE = 10**9
PROBES = Probes([[(7 * position + row) % 32_000 for position in range(64)] for row in range(8)])


def main() -> None:
    """Make the model, run every merge, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=18, help="default 18, which is 2 GB")
    parser.add_argument("--shard-size", default="200MB", help="default 200MB")
    parser.add_argument("--limit", type=float, default=1.0, help="gigabytes, default 1.0")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        run_here(options.way, options.folder, options.shard_size, options.limit)
        return
    with TemporaryDirectory() as name:
        save_in_new_process(Path(name), options.layers, options.shard_size)
        size = sum(file.stat().st_size for file in (Path(name) / "base").glob("*.safetensors"))
        print(f"model: {size / GIGABYTE:.2f} GB in files of {options.shard_size}")
        print(f"{'merge':<28} {'limit':>7} {'seconds':>8} {'peak':>8}")
        for way in WAYS:
            for limit in (0.0, options.limit):
                print(run_alone(way, Path(name), options.shard_size, limit), flush=True)


def run_alone(way: str, folder: Path, shard_size: str, limit: float) -> str:
    """Merge in a separate process and return a line of the table."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.merge", "--way", way, "--folder", str(folder),
         "--shard-size", shard_size, "--limit", str(limit)],
        capture_output=True,
        text=True,
    )  # fmt: skip
    limited = f"{limit:g} GB" if limit else "none"
    if result.returncode:
        return f"{way:<28} {limited:>7} {'failed: out of memory':>17}"
    figures = json.loads(result.stdout.splitlines()[-1])
    peak = f"{figures['peak'] / 1e6:,.0f} MB"
    return f"{way:<28} {limited:>7} {figures['seconds']:8.1f} {peak:>8} {figures['note']}"


def run_here(way: str, folder: Path, shard_size: str, limit: float) -> None:
    """Merge in this process, with a limit on its data memory, and print the figures as JSON."""
    if limit:
        limit_bytes = int(limit * GIGABYTE)
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    started = time.perf_counter()
    note = WAYS[way](folder, shard_size)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak": peak_bytes(), "note": note}))


def ours(folder: Path, shard_size: str, *, proves: bool = False) -> str:
    """Merge as `yrun merge` does; return the divergence where `proves`."""
    lower_mmap_threshold()
    merged = folder / "merged by yrunner"
    merged.mkdir(exist_ok=True)
    adapters = [WeightedAdapter(folder / "adapter")]
    prepared = prepare_merge(open_checkpoint(str(folder / "base")), adapters)
    write_merged(prepared, merged, dtype=None, shard_size=shard_size, advance=lambda _: None)
    if not proves:
        return ""
    expected_NV = merge_logits(prepared, adapters, PROBES, trust_remote_code=False)
    equivalence = compare(expected_NV, folder_logits(merged, PROBES, trust_remote_code=False))
    return f"divergence {equivalence.mean_kl:.1g} nats"


def ours_with_proof(folder: Path, shard_size: str) -> str:
    """Merge, and prove that the merged model computes the same."""
    return ours(folder, shard_size, proves=True)


def peft(folder: Path, shard_size: str) -> str:
    """Merge as the documentation of peft does."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    model.save_pretrained(folder / "merged by peft", max_shard_size=shard_size)
    return ""


def save_in_new_process(folder: Path, num_layers: int, shard_size: str) -> None:
    """Save base and adapter in a process whose memory is not measured."""
    program = (
        f"from benchmarks.merge import save_inputs; "
        f"save_inputs({str(folder)!r}, {num_layers}, {shard_size!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def save_inputs(folder: str, num_layers: int, shard_size: str) -> None:
    """Save a base of random weights in bfloat16, and an adapter that changes every layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(Path(folder) / "base", max_shard_size=shard_size)
    settings = LoraConfig(
        r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    get_peft_model(model, settings).save_pretrained(Path(folder) / "adapter")


WAYS = {
    "yrunner": ours,
    "yrunner, with its proof": ours_with_proof,
    "peft, merge_and_unload": peft,
}

if __name__ == "__main__":
    main()
