"""What the heavy libraries can do here, each asked in a process of its own.

So they are imported side by side, one that crashes takes nothing with it, and one that hangs can
be stopped. `python -m yrunner.assembly.probes torch` prints the findings as JSON, last.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError
from urllib.request import Request, urlopen

SECONDS_TO_ANSWER = 180.0
"""A cold start of torch takes half a minute from a slow disk, and longer on a busy machine."""
HUB_SECONDS = 3.0
"""How long the Hub may take to answer."""
DEEPSPEED_OPERATIONS = {
    "fused_adam": "install the CUDA toolkit of your torch: conda install -c nvidia cuda-toolkit",
    "cpu_adam": "apt-get install g++ python3-dev && pip install ninja",
    "async_io": "apt-get install libaio-dev",
    "deepspeed_shm_comm": "apt-get install g++ python3-dev && pip install ninja",
}
"""The operations that training may use, and what they are built with: Adam on a GPU, Adam of
offloaded states, offloading to a disk, and communication of processes without GPUs."""


@dataclass(frozen=True)
class Capability:
    """One part: there, or missing with the command that adds it."""

    group: str
    """What the part belongs to, such as `compiler`."""
    part: str
    state: Literal["ok", "missing"]
    found: str
    """A version, a size, or what is wrong."""
    remedy: str = ""
    """What to do where it is missing; a command where one does it."""
    needed: bool = False
    """Whether yrunner itself cannot do without it, and not just some recipes."""


def found(group: str, part: str, what: str) -> Capability:
    """A part that is there."""
    return Capability(group, part, "ok", what)


def missing(group: str, part: str, why: str, *, remedy: str, needed: bool = False) -> Capability:
    """A part that is not there, or not as it should be."""
    return Capability(group, part, "missing", why, remedy, needed)


def ask(probe: str, seconds: float = SECONDS_TO_ANSWER) -> list[Capability]:
    """What a probe found in its own process; that it failed is a finding too."""
    command = [sys.executable, "-m", "yrunner.assembly.probes", probe]
    # Only torch is needed by everyone.
    needed = probe == "torch"
    remedy = "pip install --force-reinstall 'yrunner[deepspeed,qlora]'"
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        why = f"did not answer within {seconds:g} seconds"
        return [missing(probe, probe, why, remedy=remedy, needed=needed)]
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines()
        why = lines[-1] if lines else f"ended with code {result.returncode}"
        return [missing(probe, probe, why, remedy=remedy, needed=needed)]
    # Libraries print what they like before.
    answer: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return [Capability(**finding) for finding in answer]


def look_at_torch() -> Iterator[Capability]:
    """Devices, communication between processes, and attention kernels."""
    yield from _devices()
    yield from _communication()
    yield from _attention()


def look_at_deepspeed() -> Iterator[Capability]:
    """Which of DeepSpeed's operations are built already, or could be."""
    if find_spec("deepspeed") is None:
        return
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from torch.utils.cpp_extension import get_default_build_root

    place = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    built_here = {file.stem for file in Path(place).rglob("*.so")}
    for name, remedy in DEEPSPEED_OPERATIONS.items():
        if name not in ALL_OPS:
            continue
        if installed_ops.get(name) or name in built_here:
            yield found("deepspeed", name, "built")
        elif ALL_OPS[name].is_compatible(verbose=False):
            yield found("deepspeed", name, "can be built, at its first use")
        else:
            yield missing("deepspeed", name, "cannot be built here", remedy=remedy)


def look_at_bitsandbytes() -> Iterator[Capability]:
    """Whether weights survive the way into 4 bits and back, on the device that would train."""
    if find_spec("bitsandbytes") is None:
        return
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
    restored = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
    error = float((restored - weight).abs().max())
    if error < 0.2:  # nf4's widest gap between two of its 16 values is 0.30
        yield found("bitsandbytes", "4 bits", f"work on {device}")
        return
    yield missing(
        "bitsandbytes",
        "4 bits",
        f"come back wrong on {device}, by up to {error:.2f}",
        remedy="pip install --force-reinstall 'yrunner[qlora]'",
    )


def look_at_hub() -> Iterator[Capability]:
    """Whether models and data can be downloaded. A machine without it trains from folders."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        why, remedy = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
        yield missing("hub", constants.ENDPOINT, why, remedy=remedy)
        return
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS):
            yield found("hub", constants.ENDPOINT, "answers")
    except (URLError, TimeoutError) as error:
        yield missing(
            "hub",
            constants.ENDPOINT,
            f"cannot be reached ({getattr(error, 'reason', error)})",
            remedy="name folders in model.base, or set HF_ENDPOINT or HTTPS_PROXY",
        )


def _devices() -> Iterator[Capability]:
    import torch

    yield found("devices", "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    for number in range(torch.cuda.device_count()):
        traits = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        bf16 = "bfloat16" if traits.major >= 8 else "no bfloat16"
        sizes = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB"
        yield found("devices", f"gpu {number}", f"{traits.name}, {sizes}, {bf16}")
    if torch.cuda.is_available():
        return
    if shutil.which("nvidia-smi") is not None:
        yield missing(
            "devices",
            "gpu",
            f"there is a driver, but torch {torch.__version__} reaches no GPU with it",
            remedy="pip install --force-reinstall torch "
            "--index-url https://download.pytorch.org/whl/cu128",
        )
    else:
        yield missing(
            "devices",
            "gpu",
            "none; a CPU trains models of some million weights",
            remedy="with a GPU in the machine: apt-get install nvidia-driver",
        )


def _communication() -> Iterator[Capability]:
    import torch
    from torch import distributed

    if distributed.is_nccl_available():
        version = ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
        yield found("processes", "nccl", version)
    else:
        why = f"not in torch {torch.__version__}; several GPUs need it"
        remedy = "pip install --force-reinstall torch, on Linux, with its CUDA packages"
        yield missing("processes", "nccl", why, remedy=remedy)
    try:
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        total = torch.ones(1)
        distributed.all_reduce(total)
        distributed.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        why = f"cannot start ({str(error).splitlines()[0]}); several processes on a CPU need it"
        yield missing("processes", "gloo", why, remedy="export GLOO_SOCKET_IFNAME=lo")
    else:
        yield found("processes", "gloo", "a group of one has summed a number")


def _attention() -> Iterator[Capability]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.ones(1, 2, 4, 8, device=device)
    if scaled_dot_product_attention(query, query, query, is_causal=True).isfinite().all():
        yield found("attention", "sdpa", f"works on {device}")
    else:
        remedy = "pip install --force-reinstall torch"
        yield missing("attention", "sdpa", "gives no numbers", remedy=remedy, needed=True)
    if find_spec("flash_attn") is not None and device == "cuda":
        yield found("attention", "flash_attention_2", version("flash-attn"))
    else:
        why = "not installed" if device == "cuda" else "needs a GPU"
        remedy = "pip install flash-attn --no-build-isolation; sdpa stands in for it"
        yield missing("attention", "flash_attention_2", why, remedy=remedy)


PROBES: dict[str, Callable[[], Iterator[Capability]]] = {
    "torch": look_at_torch,
    "deepspeed": look_at_deepspeed,
    "bitsandbytes": look_at_bitsandbytes,
    "hub": look_at_hub,
}

if __name__ == "__main__":
    print(json.dumps([asdict(finding) for finding in PROBES[sys.argv[1]]()]))  # noqa: T201
