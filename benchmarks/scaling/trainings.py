"""The trainings of docs/results/scaling.md: models from 0.6B to 70B, estimated without weights.

The estimator of `yrun check` traces two short models of each family on fake tensors. All trainings
use bfloat16, one row of targets per GPU and micro-batch, gradient checkpointing and AdamW; LoRA has
rank 16 on all linear layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, PreTrainedConfig

from benchmarks.markdown import Cell
from benchmarks.memory import full_batch
from benchmarks.scaling.operations import Attention, Operations, count_operations
from yrunner.models.meta import build_fake_model
from yrunner.models.quantization import bytes_per_weight
from yrunner.models.size import WeightCounts, count_weights_of
from yrunner.recipe.schema.model import FullTuning, LoraTuning, Tuning
from yrunner.training.deepspeed.state import MOMENTS
from yrunner.training.memory.trace import GrownTrace, StepTrace, trace_update
from yrunner.training.memory.zero import FLOAT32, Sharing, Workload, memory_per_gpu

QWEN3 = {"model_type": "qwen3", "vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8}
LLAMA = {"model_type": "llama", "vocab_size": 128_256, "head_dim": 128, "num_key_value_heads": 8}


def _form(family: dict[str, Any], width: int, inner: int, layers: int, heads: int) -> Any:
    tied = family is QWEN3 and width < 4096
    return family | {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 40_960,
    }


FORMS = {
    "Qwen3 0.6B": _form(QWEN3, 1024, 3072, 28, 16),
    "Qwen3 1.7B": _form(QWEN3, 2048, 6144, 28, 16),
    "Qwen3 4B": _form(QWEN3, 2560, 9728, 36, 32),
    "Qwen3 8B": _form(QWEN3, 4096, 12_288, 36, 32),
    "Qwen3 14B": _form(QWEN3, 5120, 17_408, 40, 40),
    "Qwen3 32B": _form(QWEN3, 5120, 25_600, 64, 64),
    "Llama 70B": _form(LLAMA, 8192, 28_672, 80, 64),
}
"""Sizes from the `config.json` of each model."""
SMALL_MIDDLE_LARGE = ("Qwen3 0.6B", "Qwen3 8B", "Llama 70B")
KINDS = ("lora", "qlora", "full")
LENGTHS = (2048, 4096, 8192, 16_384, 32_768)
TRACED = (1024, 2048)
"""Tokens of the rows that are traced; longer ones are extrapolated. Shorter rows would not fill a
chunk of the head."""


Column = TypeVar("Column")
"""What a column stands for: a machine or a layout."""


def every_training(
    figure_of: Callable[[str, str, Column], Cell], columns: Sequence[Column]
) -> list[list[Cell]]:
    """Return the rows of a table of all models and tunings, with a figure for each column."""
    return [
        [form, kind, *(figure_of(form, kind, column) for column in columns)]
        for form in FORMS
        for kind in KINDS
    ]


@cache
def config_of(form: str) -> PreTrainedConfig:
    """Return the config of a model."""
    return AutoConfig.for_model(**FORMS[form])


@cache
def job_of(form: str, kind: str, length: int = LENGTHS[0]) -> Workload:
    """Estimate an update of one row of `length` targets."""
    if kind == "qlora":
        return replace(
            job_of(form, "lora", length), stored=bytes_per_weight("nf4", double_quant=True)
        )
    first, second = (trace_row(form, kind, tokens) for tokens in TRACED)
    update = GrownTrace(
        short=extrapolate(first.short, second.short, length),
        longer=extrapolate(first.longer, second.longer, length),
        short_layers=second.short_layers,
        layers=second.layers,
    )
    return Workload(update, counts_of(form, kind), 2, config_of(form).hidden_size ** 2)


@cache
def trace_row(form: str, kind: str, length: int) -> GrownTrace:
    """Trace an update of one row of `length` targets."""
    build = partial(build_fake_model, tuning=_tuning(kind), dtype=torch.bfloat16)
    update = trace_update(
        build(config_of(form)),
        build,
        full_batch(1, length, num_targets=length),
        dtype=torch.bfloat16,
        optimizer="adamw_torch",
        gradient_checkpointing=True,
        foreach=True,
    )
    assert isinstance(update, GrownTrace), "all models have enough layers"
    return update


def extrapolate(first: StepTrace, second: StepTrace, length: int) -> StepTrace:
    """Extrapolate the trace of a longer row linearly from two shorter rows.

    Each moment of an update is identified by its gradients, which do not depend on the row.
    """
    steps = (length - TRACED[0]) / (TRACED[1] - TRACED[0])

    def grown(name: str) -> tuple[tuple[int, int], ...]:
        before, after = dict(getattr(first, name)), dict(getattr(second, name))
        return tuple(
            (gradients, before[gradients] + round(steps * (after[gradients] - before[gradients])))
            for gradients in after
        )

    return replace(
        second,
        while_computing=grown("while_computing"),
        while_updating=grown("while_updating"),
        without_copies=grown("without_copies"),
    )


@cache
def counts_of(form: str, kind: str) -> WeightCounts:
    """Count all weights and the trained ones."""
    model = build_fake_model(config_of(form), _tuning(kind), dtype=torch.bfloat16)
    return count_weights_of(model)


def operations_of(form: str, kind: str, length: int) -> Operations:
    """Count the operations of a micro-batch of one row."""
    config = config_of(form)
    return count_operations(
        counts_of(form, kind),
        Attention(config.num_hidden_layers, config.num_attention_heads * config.head_dim),
        rows=1,
        length=length,
        targets=length,
        trains_head=kind == "full",
        recomputes=True,
    )


def possible(kind: str, layout: Sharing) -> bool:
    """Return whether the layout supports this tuning."""
    return not (kind == "qlora" and layout.stage == 3)


def gigabytes(form: str, kind: str, layout: Sharing, length: int = LENGTHS[0]) -> float | None:
    """Estimate the peak of each GPU."""
    if not possible(kind, layout):
        return None
    return memory_per_gpu(job_of(form, kind, length), layout).peak / 1e9


def saved_tensors_bytes(numbers: int) -> int:
    """Return the bytes of weights and AdamW moments in a checkpoint, all in float32."""
    return FLOAT32 * (1 + len(MOMENTS["adamw_torch"])) * numbers


def _tuning(kind: str) -> Tuning:
    return FullTuning(kind="full") if kind == "full" else LoraTuning(dropout=0.0)
