"""What a run needs of memory and disk, found without loading a weight."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from yrunner.commands.base import base_source, stale_base
from yrunner.commands.check_keep import keep_notes
from yrunner.commands.train_plan import layout_for
from yrunner.data.collate import collate
from yrunner.data.conversation import TokenizedExample
from yrunner.models.disk import estimate_disk
from yrunner.models.load import check_vocabulary, choose_dtype
from yrunner.models.scratch import make_config
from yrunner.models.tuning import count_parameters
from yrunner.models.weightless import build_weightless, read_config
from yrunner.recipe.schema import Recipe
from yrunner.recipe.schema_model import FullTuning, LoraTuning, Tuning
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.memory import (
    METHOD,
    NOT_COUNTED,
    StepTrace,
    Untraceable,
    trace_step,
)

MANY_DEVICES = 8
"""Devices in the lines for ZeRO: those of one common machine."""


@dataclass(frozen=True)
class MemoryLine:
    """What each device holds at the busiest moment, in bytes."""

    tuning: str
    layout: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int


@dataclass(frozen=True)
class MemoryFacts:
    """What one device needs, under the recipe's tuning and others."""

    lines: list[MemoryLine]
    notes: list[str]


@dataclass(frozen=True)
class DiskFacts:
    """What the run writes, in bytes."""

    checkpoint: int
    num_checkpoints: int
    model: int
    needed: int
    """At the fullest moment."""
    free: int


def estimate_memory(
    recipe: Recipe, tokenizer: Any, micro_batch: Sequence[TokenizedExample]
) -> tuple[MemoryFacts, DiskFacts | None]:
    """The memory of one device for the recipe's tuning, for LoRA and for full; and the disk.

    `micro_batch` is the largest of the run. The disk is not known of a model that cannot be traced.
    """
    config = recipe_config(recipe, tokenizer)
    dtype = choose_dtype(recipe.model.dtype)
    # Weights from scratch are made in float32, loaded ones come in the dtype of the computation.
    weights_dtype = dtype if recipe.model.scratch is None else torch.float32
    lines: list[MemoryLine] = []
    notes = [METHOD, NOT_COUNTED]
    disk = None
    for number, tuning in enumerate(_tunings(recipe)):
        model = build_weightless(
            config,
            tuning,
            dtype=weights_dtype,
            attention=recipe.model.attention,
            trust_remote_code=recipe.model.trust_remote_code,
        )
        check_vocabulary(model, tokenizer)
        # As if the model kept examples apart, which the run tries out on its weights.
        layout = layout_for(model.config, isolates=True)
        batch = collate(micro_batch, tokenizer.pad_token_id, layout)
        trace = trace_step(
            model,
            batch,
            dtype=dtype,
            optimizer=recipe.train.optimizer,
            accumulation=recipe.train.gradient_accumulation_steps,
            gradient_checkpointing=recipe.train.gradient_checkpointing,
            foreach=torch.cuda.is_available(),
        )
        if isinstance(trace, Untraceable):
            notes.insert(0, f"{tuning.kind}: could not be estimated: {trace.reason}")
            continue
        is_own = number == 0
        lines += _lines(f"{tuning.kind} (this recipe)" if is_own else tuning.kind, trace)
        if is_own:
            need = estimate_disk(model, trace.optimizer, tokenizer)
            disk = _disk(recipe, need.checkpoint, need.model)
            notes.insert(0, _describe(batch, dtype))
            notes += keep_notes(recipe, count_parameters(model)[0])
    return MemoryFacts(lines, notes), disk


def recipe_config(recipe: Recipe, tokenizer: Any) -> Any:
    """The config of the recipe's model, also before its base has been trained."""
    if recipe.model.scratch is not None:
        return make_config(recipe.model.scratch.config, tokenizer)
    stale = stale_base(recipe)
    if stale is not None:
        return recipe_config(stale[0], tokenizer)
    source = base_source(recipe)
    return read_config(source, trust_remote_code=recipe.model.trust_remote_code)


def _describe(batch: dict[str, Tensor], dtype: torch.dtype) -> str:
    rows, length = batch["input_ids"].shape
    targets = int((batch["labels"] != IGNORE_INDEX).sum())
    return (
        f"the largest micro-batch: {rows:,} x {length:,} tokens, {targets:,} targets; computed in "
        f"{str(dtype).removeprefix('torch.')}"
    )


def _tunings(recipe: Recipe) -> list[Tuning]:
    """The recipe's own, and those that people ask about."""
    others: list[Tuning] = [LoraTuning(), FullTuning(kind="full")]
    if recipe.model.scratch is not None:
        others = []
    own = recipe.tuning
    if isinstance(own, LoraTuning) and own.adapter is not None:
        # The adapter's own shape counts; it is read when it is attached.
        return [own]
    return [own, *(other for other in others if other.kind != own.kind)]


def _lines(tuning: str, trace: StepTrace) -> Iterator[MemoryLine]:
    layouts = [("1", 0, 1)]
    layouts += [(f"{MANY_DEVICES}, ZeRO {stage}", stage, MANY_DEVICES) for stage in (1, 2, 3)]
    for layout, stage, devices in layouts:
        step = trace.per_device(stage, devices)
        yield MemoryLine(tuning, layout, **asdict(step), peak=step.peak)


def _disk(recipe: Recipe, checkpoint: int, model: int) -> DiskFacts:
    validates = bool(recipe.data.validation) or recipe.data.validation_share is not None
    # Beside the newest there is the best one by validation; one is written before another goes.
    number = recipe.train.checkpoint.keep + validates
    folder = recipe.run_folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return DiskFacts(checkpoint, number, model, (number + 1) * checkpoint + model, free)
