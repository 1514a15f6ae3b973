"""The trainings that docs/results/scaling.md compares: models from 0.6B to 70B, on paper.

Nothing is trained and no weight exists: the estimator that `yrun check` uses runs two short models
of each form on tensors without values. Every row is full of targets, in bfloat16, one row at a time
on each GPU, with gradient checkpointing and AdamW, LoRA of rank 16 on all linear layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, PreTrainedConfig

from benchmarks.markdown import Cell
from benchmarks.memory import full_batch
from yrunner.models.meta import build_weightless
from yrunner.models.quantization import bytes_of_stored
from yrunner.models.size import WeightCounts, count_weights_of
from yrunner.recipe.schema.model import FullTuning, LoraTuning, Tuning
from yrunner.training.deepspeed.state import MOMENTS
from yrunner.training.memory.trace import GrownTrace, StepTrace, trace_update
from yrunner.training.memory.zero import FLOAT32, Sharing, Workload, memory_per_gpu
from yrunner.training.operations import Attention, Operations, count_operations

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
"""Sizes as in the `config.json` of each model."""
SMALL_MIDDLE_LARGE = ("Qwen3 0.6B", "Qwen3 8B", "Llama 70B")
KINDS = ("lora", "qlora", "full")
LENGTHS = (2048, 4096, 8192, 16_384, 32_768)
TRACED = (1024, 2048)
"""Tokens of the rows that are run; longer ones are carried on from these. Shorter ones would not
fill the head's chunk."""


Column = TypeVar("Column")
"""What stands at the head of a column: a machine, or a way of sharing memory out."""


def every_training(
    figure_of: Callable[[str, str, Column], Cell], columns: Sequence[Column]
) -> list[list[Cell]]:
    """The rows of a table of every form and kind of tuning, with a figure for each column."""
    return [
        [form, kind, *(figure_of(form, kind, column) for column in columns)]
        for form in FORMS
        for kind in KINDS
    ]


@cache
def config_of(form: str) -> PreTrainedConfig:
    """The config of a model, without any weight."""
    return AutoConfig.for_model(**FORMS[form])


@cache
def job_of(form: str, kind: str, length: int = LENGTHS[0]) -> Workload:
    """An update of one row of so many targets."""
    if kind == "qlora":
        return replace(
            job_of(form, "lora", length), stored=bytes_of_stored("nf4", double_quant=True)
        )
    first, second = (trace_row(form, kind, tokens) for tokens in TRACED)
    update = GrownTrace(
        short=carried_on(first.short, second.short, length),
        longer=carried_on(first.longer, second.longer, length),
        layers=second.layers,
    )
    return Workload(update, counts_of(form, kind), 2, config_of(form).hidden_size ** 2)


@cache
def trace_row(form: str, kind: str, length: int) -> GrownTrace:
    """One update on a row of so many targets, run."""
    build = partial(build_weightless, tuning=_tuning(kind), dtype=torch.bfloat16)
    update = trace_update(
        build(config_of(form)),
        build,
        full_batch(1, length, num_targets=length),
        dtype=torch.bfloat16,
        optimizer="adamw_torch",
        gradient_checkpointing=True,
        foreach=True,
    )
    assert isinstance(update, GrownTrace), "all forms have layers enough"
    return update


def carried_on(first: StepTrace, second: StepTrace, length: int) -> StepTrace:
    """The update of a longer row: every moment of it grows as it did between two shorter rows.

    A moment is named by the gradients that are there, which do not depend on the row.
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
    """How many numbers there are, and are trained."""
    model = build_weightless(config_of(form), _tuning(kind), dtype=torch.bfloat16)
    return count_weights_of(model)


def operations_of(form: str, kind: str, length: int) -> Operations:
    """Of a micro-batch of one row."""
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
    """Whether weights of that kind can be shared out so."""
    return not (kind == "qlora" and layout.stage == 3)


def gigabytes(form: str, kind: str, layout: Sharing, length: int = LENGTHS[0]) -> float | None:
    """The peak of each GPU."""
    if not possible(kind, layout):
        return None
    return memory_per_gpu(job_of(form, kind, length), layout).peak / 1e9


def saved_tensors_bytes(numbers: int) -> int:
    """So many weights in float32, and what AdamW remembers of them, as a checkpoint holds them."""
    return FLOAT32 * (1 + len(MOMENTS["adamw_torch"])) * numbers


def _tuning(kind: str) -> Tuning:
    return FullTuning(kind="full") if kind == "full" else LoraTuning(dropout=0.0)
