"""Merge a model of 2 GB in little memory, beside peft: python -m benchmarks.merge

Each way runs in a process of its own. Memory is the most that was resident, the interpreter and
its libraries included. A second line of each way runs it where the process may take no more than
--limit gigabytes for its own data: what does not fit fails there.
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

from yrunner.models.local import give_back_freed_memory
from yrunner.models.merge.plan import Weighted, prepare_merge
from yrunner.models.merge.proof import Probes, compare, folder_logits, merge_logits
from yrunner.models.merge.safetensors_io import open_checkpoint
from yrunner.models.merge.write import write_merged

GIGABYTE = 10**9
PROBES = Probes([[(7 * place + row) % 32_000 for place in range(64)] for row in range(8)])


def main() -> None:
    """Make the model, run each way, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=18, help="18 make 2 GB in bfloat16")
    parser.add_argument("--shard-size", default="200MB")
    parser.add_argument("--limit", type=float, default=1.0)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        run_here(options.way, options.folder, options.shard_size, options.limit)
        return
    with TemporaryDirectory() as name:
        make_in_a_process(Path(name), options.layers, options.shard_size)
        size = sum(file.stat().st_size for file in (Path(name) / "base").glob("*.safetensors"))
        print(f"model: {size / GIGABYTE:.2f} GB in files of {options.shard_size}")
        print(f"{'way':<28} {'limit':>7} {'seconds':>8} {'peak':>8}")
        for way in WAYS:
            for limit in (0.0, options.limit):
                print(line(way, Path(name), options.shard_size, limit), flush=True)


def line(way: str, folder: Path, shard_size: str, limit: float) -> str:
    """What one process did."""
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
    return f"{way:<28} {limited:>7} {figures['seconds']:8.1f} {peak:>8} {figures['told']}"


def run_here(way: str, folder: Path, shard_size: str, limit: float) -> None:
    """Run one way under a limit of the process's own data, and print its figures as JSON."""
    if limit:
        most = int(limit * GIGABYTE)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    started = time.perf_counter()
    told = WAYS[way](folder, shard_size)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak": peak_bytes(), "told": told}))


def peak_bytes() -> int:
    """Most that this process has held; `getrusage` would begin with what its parent held."""
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def ours(folder: Path, shard_size: str, *, proves: bool = False) -> str:
    """Merge as `yrun merge` does, with or without its proof."""
    give_back_freed_memory()
    merged = folder / "merged by us"
    merged.mkdir(exist_ok=True)
    adapters = [Weighted(folder / "adapter")]
    prepared = prepare_merge(open_checkpoint(str(folder / "base")), adapters)
    write_merged(prepared, merged, dtype=None, shard_size=shard_size, advance=lambda _: None)
    if not proves:
        return ""
    expected_NV = merge_logits(prepared, adapters, PROBES, trust_remote_code=False)
    likeness = compare(expected_NV, folder_logits(merged, PROBES, trust_remote_code=False))
    return f"divergence {likeness.mean_kl:.1g} nats"


def proven(folder: Path, shard_size: str) -> str:
    """Merge and prove."""
    return ours(folder, shard_size, proves=True)


def peft(folder: Path, shard_size: str) -> str:
    """Merge as peft's documentation does."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    model.save_pretrained(folder / "merged by peft", max_shard_size=shard_size)
    return ""


def make_in_a_process(folder: Path, num_layers: int, shard_size: str) -> None:
    """Make base and adapter where it does not count as memory of ours."""
    program = (
        f"from benchmarks.merge import make; make({str(folder)!r}, {num_layers}, {shard_size!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def make(folder: str, num_layers: int, shard_size: str) -> None:
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
    "yrunner, with its proof": proven,
    "peft, merge_and_unload": peft,
}

if __name__ == "__main__":
    main()
