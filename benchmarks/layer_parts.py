"""What would other ways to compute the parts of a layer save on this processor?

    OMP_NUM_THREADS=1 python -m benchmarks.layer_parts [--repeats 5]

Attention: forward and backward pass of one example with the heads of SmolLM2-135M (nine, three of
keys), as torch computes it and in blocks of queries (`models/layers/example_attention.py`).
Products: those with the frozen weights of that model in bfloat16, as torch takes the weights and
with weights that were laid out for oneDNN once, forward (x W') and backward (g W). Each weight is
read once a round, so that none is in a cache. The least processor time of several rounds counts,
in turns.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, bfloat16
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.limit import MULTIPLY_AND_ADD
from benchmarks.markdown import print_markdown
from yrunner.models.layers.example_attention import _in_blocks

LENGTHS = (64, 128, 192, 256, 512, 1024, 2048)
HEADS, KEYS, SIZE = 9, 3, 64
WAYS: dict[str, Callable[..., Tensor]] = {
    "torch": partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True),
    "in blocks, backward in bfloat16": lambda *inputs: _in_blocks(*inputs, SIZE**-0.5),
}
SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536))
"""Outputs and inputs."""
ROWS = (128, 270, 1024)
BYTES_OF_WEIGHTS = 40e6
"""More than a cache holds."""


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print_attention(options.repeats)
    print_products(options.repeats)


def print_attention(repeats: int) -> None:
    """Milliseconds by length."""
    rows = []
    for length in LENGTHS:
        inputs = [
            torch.randn(1, length, heads, SIZE).transpose(1, 2).requires_grad_()
            for heads in (HEADS, KEYS, KEYS)
        ]
        calls = {name: [partial(differentiate, way, inputs)] for name, way in WAYS.items()}
        rows.append([str(length), *(1e3 * it for it in least_seconds(calls, repeats).values())])
    print_markdown("Attention of an example, ms", ("tokens", *WAYS), rows)


def differentiate(attend: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Forward and backward pass."""
    output = attend(*inputs)
    torch.autograd.grad(output, inputs, torch.ones_like(output))


def print_products(repeats: int) -> None:
    """Rates in GFLOP/s by shape."""
    lay_out: Any = torch.ops.mkldnn._reorder_linear_weight
    multiply: Any = torch.ops.mkldnn._linear_pointwise.binary
    rows = []
    for num_rows in ROWS:
        for outputs, inputs in SHAPES:
            number = round(BYTES_OF_WEIGHTS / (2 * outputs * inputs))
            weights = [torch.randn(outputs, inputs).to(bfloat16) for _ in range(number)]
            x, y = (torch.randn(num_rows, size).to(bfloat16) for size in (inputs, outputs))
            forward = [lay_out(it, num_rows) for it in weights]
            backward = [lay_out(it.T.contiguous(), num_rows) for it in weights]
            calls: dict[str, list[Callable[[], Any]]] = {
                "forward": [partial(y.addmm_, x, it.T) for it in weights],
                "forward, laid out": [partial(multiply, x, y, it, None, "add") for it in forward],
                "backward": [partial(x.addmm_, y, it) for it in weights],
                "backward, laid out": [partial(multiply, y, x, it, None, "add") for it in backward],
            }
            work = MULTIPLY_AND_ADD * num_rows * outputs * inputs / 1e9
            rates = [work / it for it in least_seconds(calls, repeats).values()]
            rows.append([str(num_rows), f"{outputs} x {inputs}", *rates])
    columns = ("rows", "weight", "forward", "laid out", "backward", "laid out")
    print_markdown("Products in bfloat16, GFLOP/s", columns, rows)


def least_seconds(
    calls: Mapping[str, Sequence[Callable[[], Any]]], repeats: int
) -> dict[str, float]:
    """Processor time of a call of each kind."""
    found: dict[str, float] = {}
    for _ in range(repeats + 1):
        for name, its in calls.items():
            began = time.process_time()
            for call in its:
                call()
            seconds = (time.process_time() - began) / len(its)
            found[name] = min(seconds, found.get(name, seconds))
    return found


if __name__ == "__main__":
    main()
