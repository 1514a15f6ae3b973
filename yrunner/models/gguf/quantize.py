"""Quantize a GGUF file by llama.cpp's own quantizer, through its binding llama-cpp-python.

The quantizer runs in a process of its own, with this file as its program: it can be interrupted,
and an assertion that fails in C++ ends that process only.
"""

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yrunner.errors import ModelError

K_QUANTS = ("q6_k", "q5_k_m", "q4_k_m")
"""Types that only llama.cpp can write. Each of its mixtures has several types of weights."""
BLOCK = 256
"""Numbers of a row that K-quants quantize together."""
TENSOR_LINE = re.compile(r"\[ *\d+/ *\d+\] ")
"""The beginning of what llama.cpp prints for every weight."""
SHOWN_LINES = 3


@dataclass(frozen=True)
class StoredTypes:
    """How many matrices of a GGUF file have which type, and which of them fell back."""

    matrices: dict[str, int]
    """By type, such as `Q4_K`, the most frequent first."""
    fallback: dict[str, list[str]]
    """By type, the matrices whose rows K-quants cannot hold, and which llama.cpp stores so."""
    widths: list[int]
    """Row widths of those."""

    def in_words(self) -> str:
        """One line about the types of the matrices."""
        return ", ".join(f"{number:,} in {name}" for name, number in self.matrices.items())

    def fallback_in_words(self) -> str:
        """One line about what fell back; empty if nothing did."""
        names = [name for found in self.fallback.values() for name in found]
        if not names:
            return ""
        kinds = ", ".join(f"{len(found):,} in {kind}" for kind, found in self.fallback.items())
        widths = " or ".join(f"{width:,}" for width in self.widths)
        return (
            f"K-quants need rows of a multiple of {BLOCK} numbers; {len(names):,} of "
            f"{sum(self.matrices.values()):,} matrices have rows of {widths}, and llama.cpp stores "
            f"them in other types: {kinds}, such as {names[0]}"
        )


def stored_types(tensors: Mapping[str, Any]) -> StoredTypes:
    """The types of the matrices of a GGUF file; `tensors` are those of gguf's reader, by name."""
    matrices = {name: tensor for name, tensor in tensors.items() if len(tensor.shape) > 1}
    fallback: dict[str, list[str]] = {}
    widths = set()
    for name, tensor in matrices.items():
        width = int(tensor.shape[0])
        # llama.cpp keeps the routers of experts in float32, whatever their width.
        if width % BLOCK and tensor.tensor_type.name != "F32":
            fallback.setdefault(tensor.tensor_type.name, []).append(name)
            widths.add(width)
    kinds = Counter(tensor.tensor_type.name for tensor in matrices.values())
    return StoredTypes(dict(kinds.most_common()), fallback, sorted(widths))


def quantize(
    source: Path, target: Path, kind: str, *, threads: int, advance: Callable[[int], None]
) -> None:
    """Write the GGUF file `source`, in f32, f16 or bf16, to `target` as a K-quant.

    Calls `advance(1)` for every weight. Raises `ModelError` with llama.cpp's own words if it fails.
    """
    command = [sys.executable, "-m", __name__, str(source), str(target), kind, str(threads)]
    said: list[str] = []
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # Ctrl-C reaches this process only, which then ends the other one.
        start_new_session=True,
    ) as child:
        assert child.stderr is not None
        try:
            for line in child.stderr:
                said.append(line.strip())
                if TENSOR_LINE.match(line):
                    advance(1)
        except BaseException:
            child.kill()
            raise
    if child.returncode or not target.is_file():
        last = "; ".join(line for line in said[-SHOWN_LINES:] if line)
        raise ModelError(
            f"merge.gguf: llama.cpp could not quantize to {kind} ({last or child.returncode})",
            remedy="choose another type, such as q8_0, or update llama-cpp-python",
        )


def main(source: str, target: str, kind: str, threads: str) -> int:
    """The program of the process: quantize one file; what llama.cpp says goes to standard error."""
    # End at the next weight if the command has been killed: nobody reads what is said here then.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    import ctypes

    from llama_cpp import llama_cpp

    def say(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        os.write(2, text)

    # Kept in a variable, or Python would free it while llama.cpp calls it.
    callback = llama_cpp.llama_log_callback(say)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    parameters.nthread = int(threads)
    return int(
        llama_cpp.llama_model_quantize(
            os.fsencode(source), os.fsencode(target), ctypes.byref(parameters)
        )
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
