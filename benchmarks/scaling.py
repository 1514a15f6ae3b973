"""Memory, traffic and operations from 0.6B to 70B, on paper: python -m benchmarks.scaling [table]

Nothing is trained and no weight exists: the estimator that `yrun check` uses runs two short models
of each form on tensors without values. `table` is one of memory, sequence, gpus, traffic, time;
default all. Every figure is of rows full of targets, in bfloat16, one row at a time on each GPU,
with gradient checkpointing and AdamW, LoRA of rank 16 on all linear layers.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from benchmarks.memory import full_batch
from yrunner.console import print_table, progress
from yrunner.models.quantized import bytes_of_stored
from yrunner.models.weight_counts import count_weights_of
from yrunner.models.weightless import build_weightless
from yrunner.recipe.schema_model import FullTuning, LoraTuning, Tuning
from yrunner.training.layer_trace import trace_update
from yrunner.training.memory import Untraceable
from yrunner.training.operations import Attention, Operations, count_operations
from yrunner.training.sharing import Job, Sharing, memory_per_gpu
from yrunner.training.traffic import Traffic, traffic_per_gpu

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
KINDS = ("lora", "qlora", "full")
LENGTHS = (2048, 4096, 8192, 16_384, 32_768)
GPUS = (1, 2, 8, 64, 512)
PEAK = 989e12
"""Operations per second of an H100 in bfloat16, by its data sheet."""
REACHED = 0.4
"""Share of that peak which trainings of this kind reach: assumed, not measured here."""
LINK = 450e9
"""Bytes per second that an H100 sends to others of its machine, by its data sheet."""
NETWORK = 50e9
"""Bytes per second for each GPU between machines: one adapter of 400 Gbit/s."""
GPUS_OF_MACHINE = 8


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", choices=[[], *TABLES], help="default all")
    chosen = parser.parse_args().tables or list(TABLES)
    with progress("tables", len(chosen)) as advance:
        for name in chosen:
            print(f"\n## {name}\n")
            TABLES[name]()
            advance(1)


@cache
def config_of(form: str) -> PreTrainedConfig:
    """The config of a model, without any weight."""
    return AutoConfig.for_model(**FORMS[form])


@cache
def job_of(form: str, kind: str, length: int = LENGTHS[0]) -> Job:
    """An update of one row of so many targets."""
    if kind == "qlora":
        return replace(
            job_of(form, "lora", length), stored=bytes_of_stored("nf4", double_quant=True)
        )
    tuning: Tuning = FullTuning(kind="full") if kind == "full" else LoraTuning(dropout=0.0)
    build = partial(build_weightless, tuning=tuning, dtype=torch.bfloat16)
    whole = build(config_of(form))
    update = trace_update(
        whole,
        build,
        full_batch(1, length, num_targets=length),
        dtype=torch.bfloat16,
        optimizer="adamw_torch",
        gradient_checkpointing=True,
        foreach=True,
    )
    assert not isinstance(update, Untraceable), update.reason
    bucket = config_of(form).hidden_size ** 2
    return Job(update, count_weights_of(whole), 2, bucket)


def operations_of(form: str, kind: str, length: int) -> Operations:
    """Of a micro-batch of one row."""
    config = config_of(form)
    return count_operations(
        job_of(form, kind).counts,
        Attention(config.num_hidden_layers, config.num_attention_heads * config.head_dim),
        rows=1,
        length=length,
        targets=length,
        trains_head=kind == "full",
        recomputes=True,
    )


def layouts(gpus: int) -> list[Sharing]:
    """All that can be compared."""
    return [Sharing(gpus), *(Sharing(gpus, stage) for stage in (1, 2, 3))]


def possible(kind: str, layout: Sharing) -> bool:
    """Whether weights of that kind can be shared out so."""
    return not (kind == "qlora" and layout.stage == 3)


def print_memory() -> None:
    """Gigabytes per GPU for every model and kind, on one GPU and on eight."""
    columns = [Sharing(), *layouts(8), Sharing(8, 3, offload=True)]
    rows = [
        (form, kind, *(gigabytes(form, kind, layout) for layout in columns))
        for form in FORMS
        for kind in KINDS
    ]
    print_table(
        "GB per GPU, rows of 2,048 tokens, 8 GPUs but in the first column",
        ("model", "tuning", *(str(layout) for layout in columns)),
        rows,
    )


def gigabytes(form: str, kind: str, layout: Sharing, length: int = LENGTHS[0]) -> float | None:
    """The peak of each GPU."""
    if not possible(kind, layout):
        return None
    return round(memory_per_gpu(job_of(form, kind, length), layout).peak / 1e9, 1)


def print_sequences() -> None:
    """Gigabytes of activations by the length of the rows."""
    rows = [
        (form, kind, *(_activations(form, kind, length) for length in LENGTHS))
        for form in ("Qwen3 0.6B", "Qwen3 8B", "Llama 70B")
        for kind in ("lora", "full")
    ]
    columns = ("model", "tuning", *(f"{length:,}" for length in LENGTHS))
    print_table("GB of activations on each GPU under ZeRO 3, by tokens of a row", columns, rows)


def _activations(form: str, kind: str, length: int) -> float:
    job = job_of(form, kind, length)
    _, activations = job.update.busiest_compute(0.0, copies=False)
    return round(activations / 1e9, 1)


def print_gpus() -> None:
    """Gigabytes per GPU by their number."""
    rows = [
        (form, kind, str(layouts(2)[place]), *(_of_number(form, kind, place, n) for n in GPUS))
        for form in ("Qwen3 8B", "Llama 70B")
        for kind in ("lora", "full")
        for place in range(4)
    ]
    columns = ("model", "tuning", "", *(f"{number} GPUs" for number in GPUS))
    print_table("GB per GPU, rows of 2,048 tokens", columns, rows)


def _of_number(form: str, kind: str, place: int, gpus: int) -> float | None:
    return gigabytes(form, kind, layouts(gpus)[place])


def print_traffic() -> None:
    """Gigabytes that each GPU sends for an update of one micro-batch."""
    rows = [
        (form, kind, *(_sent(form, kind, layout) for layout in layouts(8)))
        for form in FORMS
        for kind in KINDS
    ]
    columns = ("model", "tuning", *(str(layout) for layout in layouts(8)))
    print_table("GB that each of 8 GPUs sends per update of one micro-batch", columns, rows)


def _sent(form: str, kind: str, layout: Sharing) -> float | None:
    if not possible(kind, layout):
        return None
    return float(f"{_traffic(form, kind, layout).total / 1e9:.3g}")


def _traffic(form: str, kind: str, layout: Sharing) -> Traffic:
    return traffic_per_gpu(job_of(form, kind), layout)


def print_time() -> None:
    """Seconds of an update, simulated: the least if all sending hides behind computing."""
    rows = [
        (form, kind, str(layout), *_seconds(form, kind, layout))
        for form in ("Qwen3 0.6B", "Qwen3 8B", "Llama 70B")
        for kind in ("lora", "full")
        for layout in (Sharing(8, 2), Sharing(8, 3), Sharing(64, 3), Sharing(512, 3))
    ]
    columns = ("model", "tuning", "", "GPUs", "computing", "sending", "tokens per second")
    print_table("Seconds per update of one row of 8,192 tokens per GPU, simulated", columns, rows)


def _seconds(form: str, kind: str, layout: Sharing) -> Iterator[float | str]:
    computing = operations_of(form, kind, 8192).total / (PEAK * REACHED)
    speed = LINK if layout.gpus <= GPUS_OF_MACHINE else NETWORK
    sending = _traffic(form, kind, layout).total / speed
    yield f"{layout.gpus:,}"
    yield round(computing, 3)
    yield round(sending, 3)
    fastest = layout.gpus * 8192 / max(computing, sending)
    slowest = layout.gpus * 8192 / (computing + sending)
    yield f"{slowest:,.0f} to {fastest:,.0f}"


TABLES: dict[str, Callable[[], None]] = {
    "memory": print_memory,
    "sequence": print_sequences,
    "gpus": print_gpus,
    "traffic": print_traffic,
    "time": print_time,
}

if __name__ == "__main__":
    main()
