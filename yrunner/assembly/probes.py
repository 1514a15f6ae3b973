"""What the heavy libraries can do on this machine, each probed in a separate process.

Separate processes import in parallel, contain crashes, and can be stopped if they hang.
`python -m yrunner.assembly.probes torch` prints the findings as JSON on its last line.
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

from yrunner.console import counted

SECONDS_TO_ANSWER = 180.0
"""Importing torch can take half a minute from a slow disk, more on a busy machine."""
HUB_SECONDS = 3.0
"""Timeout of a request to the Hub."""
DEEPSPEED_OPERATIONS = {
    "fused_adam": "install the CUDA toolkit of your torch: conda install -c nvidia cuda-toolkit",
    "cpu_adam": "apt-get install g++ python3-dev && pip install ninja",
    "async_io": "apt-get install libaio-dev",
    "deepspeed_shm_comm": "apt-get install g++ python3-dev && pip install ninja",
}
"""Operations that training may use, and how to get their build tools: Adam on a GPU, Adam for
offloaded states, offloading to disk, and communication on a CPU."""


@dataclass(frozen=True)
class Capability:
    """One part of the machine: present, or missing with the command that installs it."""

    group: str
    """The table section, such as `compiler`."""
    part: str
    state: Literal["ok", "missing"]
    found: str
    """A version, a size, or what is wrong."""
    remedy: str = ""
    """How to fix a missing part, if possible as a command."""
    needed: bool = False
    """Whether every recipe needs it, not just some."""


def found(group: str, part: str, what: str) -> Capability:
    """A part that works."""
    return Capability(group, part, "ok", what)


def missing(group: str, part: str, why: str, *, remedy: str, needed: bool = False) -> Capability:
    """A part that is missing or broken."""
    return Capability(group, part, "missing", why, remedy, needed)


def ask(probe: str, seconds: float = SECONDS_TO_ANSWER) -> list[Capability]:
    """Run a probe in a separate process; a failure is a finding too."""
    command = [sys.executable, "-m", "yrunner.assembly.probes", probe]
    # Only torch is needed by every recipe.
    needed = probe == "torch"
    remedy = "pip install --force-reinstall 'yrunner[deepspeed,qlora]'"
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        why = f"no answer within {seconds:g} seconds"
        return [missing(probe, probe, why, remedy=remedy, needed=needed)]
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines()
        why = lines[-1] if lines else f"exit code {result.returncode}"
        return [missing(probe, probe, why, remedy=remedy, needed=needed)]
    # Libraries may print before it.
    answer: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return [Capability(**finding) for finding in answer]


def look_at_torch() -> Iterator[Capability]:
    """Devices, communication backends and attention kernels."""
    yield from _devices()
    yield from _communication()
    yield from _attention()


def look_at_deepspeed() -> Iterator[Capability]:
    """Which of DeepSpeed's operations are built or can be built."""
    if find_spec("deepspeed") is None:
        return
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from torch.utils.cpp_extension import get_default_build_root

    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    built_here = {file.stem for file in Path(folder).rglob("*.so")}
    for name, remedy in DEEPSPEED_OPERATIONS.items():
        if name not in ALL_OPS:
            continue
        if installed_ops.get(name) or name in built_here:
            yield found("deepspeed", name, "built")
        elif ALL_OPS[name].is_compatible(verbose=False):
            yield found("deepspeed", name, "can be built at first use")
        else:
            yield missing("deepspeed", name, "cannot be built here", remedy=remedy)


def look_at_bitsandbytes() -> Iterator[Capability]:
    """Whether weights survive quantization to 4 bits and back on the training device."""
    if find_spec("bitsandbytes") is None:
        return
    import torch

    # bitsandbytes compiles functions, for which torch imports its compiler, for seconds.
    torch.compile = _left_as_it_is  # type: ignore[assignment]
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
    restored = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
    error = float((restored - weight).abs().max())
    if error < 0.2:  # nf4's widest gap between two of its 16 values is 0.30
        yield found("bitsandbytes", "4 bits", f"works on {device}")
        return
    yield missing(
        "bitsandbytes",
        "4 bits",
        f"wrong by up to {error:.2f} on {device}",
        remedy="pip install --force-reinstall 'yrunner[qlora]'",
    )


def _left_as_it_is(function: Any = None, **_options: Any) -> Any:
    """In place of `torch.compile`, also as a decorator with options."""
    return _left_as_it_is if function is None else function


def look_at_hub() -> Iterator[Capability]:
    """Whether models and data can be downloaded; without the Hub, training uses local folders."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        why, remedy = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
        yield missing("hub", constants.ENDPOINT, why, remedy=remedy)
        return
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS):
            yield found("hub", constants.ENDPOINT, "reachable")
    except (URLError, TimeoutError) as error:
        yield missing(
            "hub",
            constants.ENDPOINT,
            f"cannot be reached ({getattr(error, 'reason', error)})",
            remedy="use local folders in model.base, or set HF_ENDPOINT or HTTPS_PROXY",
        )


def _devices() -> Iterator[Capability]:
    import torch

    cores = counted(os.cpu_count() or 1, "core")
    threads = counted(torch.get_num_threads(), "thread")
    yield found("devices", "cpu", f"{cores}, {threads}")
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
            f"a driver is installed, but torch {torch.__version__} finds no GPU",
            remedy="pip install --force-reinstall torch "
            "--index-url https://download.pytorch.org/whl/cu128",
        )
    else:
        yield missing(
            "devices",
            "gpu",
            "none; on a CPU a LoRA of a model of 100 million weights trains in minutes",
            remedy="if the machine has a GPU: apt-get install nvidia-driver",
        )


def _communication() -> Iterator[Capability]:
    import torch
    from torch import distributed

    if distributed.is_nccl_available():
        version = ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
        yield found("processes", "nccl", version)
    else:
        why = f"not in torch {torch.__version__}; needed for several GPUs"
        remedy = "pip install --force-reinstall torch, on Linux, with its CUDA packages"
        yield missing("processes", "nccl", why, remedy=remedy)
    try:
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        total = torch.ones(1)
        distributed.all_reduce(total)
        distributed.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        why = f"cannot start ({str(error).splitlines()[0]}); needed for several CPU processes"
        yield missing("processes", "gloo", why, remedy="export GLOO_SOCKET_IFNAME=lo")
    else:
        yield found("processes", "gloo", "all_reduce works in a group of one")


def _attention() -> Iterator[Capability]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.ones(1, 2, 4, 8, device=device)
    if scaled_dot_product_attention(query, query, query, is_causal=True).isfinite().all():
        yield found("attention", "sdpa", f"works on {device}")
    else:
        remedy = "pip install --force-reinstall torch"
        yield missing(
            "attention", "sdpa", "gives values that are not finite", remedy=remedy, needed=True
        )
    if find_spec("flash_attn") is not None and device == "cuda":
        yield found("attention", "flash_attention_2", version("flash-attn"))
    else:
        why = "not installed" if device == "cuda" else "needs a GPU"
        remedy = "pip install flash-attn --no-build-isolation, or use sdpa"
        yield missing("attention", "flash_attention_2", why, remedy=remedy)


PROBES: dict[str, Callable[[], Iterator[Capability]]] = {
    "torch": look_at_torch,
    "deepspeed": look_at_deepspeed,
    "bitsandbytes": look_at_bitsandbytes,
    "hub": look_at_hub,
}

if __name__ == "__main__":
    print(json.dumps([asdict(finding) for finding in PROBES[sys.argv[1]]()]))  # noqa: T201
