"""What a run needs of memory and disk, found without loading a weight."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from yrunner.commands.base import base_source, stale_base
from yrunner.commands.check_keep import keep_notes
from yrunner.commands.check_machine import Machine
from yrunner.commands.disk_space import DiskFacts, disk_facts
from yrunner.commands.train_plan import layout_for
from yrunner.data.collate import collate
from yrunner.data.conversation import TokenizedExample
from yrunner.data.plan import Plan
from yrunner.models.disk import estimate_disk
from yrunner.models.load import check_vocabulary, choose_dtype
from yrunner.models.quantized import bytes_of_stored
from yrunner.models.scratch import make_config
from yrunner.models.tuning import count_parameters
from yrunner.models.weight_counts import count_weights_of
from yrunner.models.weightless import build_weightless, read_config
from yrunner.recipe.schema import Recipe
from yrunner.recipe.schema_model import (
    AdapterTuning,
    FreezeTuning,
    FullTuning,
    LoraTuning,
    QloraTuning,
    Tuning,
)
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.deepspeed_settings import deepspeed_settings
from yrunner.training.layer_trace import trace_update
from yrunner.training.memory import METHOD, NOT_COUNTED, Untraceable
from yrunner.training.sharing import Job, Sharing, memory_per_gpu, sharings_for

LIKE_OTHERS = {
    "adamw_8bit": ("adamw_torch", 0.25),
    "paged_adamw_8bit": ("adamw_torch", 0.25),
    "paged_adamw_32bit": ("adamw_torch", 1.0),
}
"""Optimizers that compute on real values only: which other one they are like, and what share of its
memory they take. The paged ones are counted as if nothing had been moved to the machine."""


@dataclass(frozen=True)
class MemoryLine:
    """What each device holds at the busiest moment, in bytes."""

    tuning: str
    layout: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    host: int
    """Of the machine's own memory, for each device."""
    peak: int
    fits: bool
    is_own: bool
    """Whether the recipe trains like this, as far as it says."""


@dataclass(frozen=True)
class MemoryFacts:
    """What each device needs, under the recipe's tuning and others."""

    machine: str
    """What it has to fit on."""
    lines: list[MemoryLine]
    notes: list[str]


@dataclass(frozen=True)
class Estimate:
    """One kind of tuning of the recipe's model, ready to be shared out."""

    job: Job
    model: Any
    """Weightless."""
    described: str
    """The micro-batch that it was found with."""


class Estimator:
    """Runs updates of a recipe's model that have no values, each of them once."""

    def __init__(self, recipe: Recipe, tokenizer: Any, machine: Machine) -> None:
        self.recipe, self.tokenizer, self.machine = recipe, tokenizer, machine
        self._kept: dict[tuple[str, int, bool], Estimate | Untraceable] = {}
        self.config = recipe_config(recipe, tokenizer)
        is_planned = recipe.model.dtype == "auto" and not machine.is_cpu
        # A machine to rent may have a GPU where this one has none.
        self.dtype = torch.bfloat16 if is_planned else choose_dtype(recipe.model.dtype)

    def estimate(
        self, tuning: Tuning, micro_batch: Sequence[TokenizedExample], *, recomputes: bool
    ) -> Estimate | Untraceable:
        """An update that learns from `micro_batch`; `recomputes`: by gradient checkpointing."""
        key = (_form(tuning), id(micro_batch), recomputes)
        if key not in self._kept:
            self._kept[key] = self._run(tuning, micro_batch, recomputes)
        found = self._kept[key]
        if isinstance(found, Untraceable) or not isinstance(tuning, QloraTuning):
            return found
        stored = bytes_of_stored(tuning.quant_type, double_quant=tuning.double_quant)
        return replace(found, job=replace(found.job, stored=stored))

    def _run(
        self, tuning: Tuning, micro_batch: Sequence[TokenizedExample], recomputes: bool
    ) -> Estimate | Untraceable:
        recipe = self.recipe
        # Weights from scratch are made in float32, loaded ones in the dtype of the computation.
        build = partial(
            build_weightless,
            tuning=tuning,
            dtype=self.dtype if recipe.model.scratch is None else torch.float32,
            attention=recipe.model.attention,
            trust_remote_code=recipe.model.trust_remote_code,
        )
        model = build(self.config)
        check_vocabulary(model, self.tokenizer)
        counts = count_weights_of(model)
        # As if the model kept examples apart, which the run tries out on its weights.
        layout = layout_for(model.config, isolates=True)
        batch = collate(micro_batch, self.tokenizer.pad_token_id, layout)
        optimizer, remembered = LIKE_OTHERS.get(recipe.train.optimizer, (recipe.train.optimizer, 1))
        update = trace_update(
            model,
            build,
            batch,
            dtype=self.dtype,
            optimizer=optimizer,
            accumulation=recipe.train.gradient_accumulation_steps,
            gradient_checkpointing=recomputes,
            foreach=not self.machine.is_cpu,
        )
        if isinstance(update, Untraceable):
            return update
        rows, length = batch["input_ids"].shape
        targets = int((batch["labels"] != IGNORE_INDEX).sum())
        described = (
            f"the largest micro-batch: {rows:,} x {length:,} tokens, {targets:,} targets; "
            f"computed in {str(self.dtype).removeprefix('torch.')}"
        )
        bucket = self.config.get_text_config().hidden_size ** 2
        job = Job(update, counts, self.dtype.itemsize, bucket, remembered=remembered)
        return Estimate(job, model, described)


def estimate_memory(
    estimator: Estimator, micro_batch: Sequence[TokenizedExample], plan: Plan
) -> tuple[MemoryFacts, DiskFacts | None]:
    """The memory of each device for the recipe's tuning and for the others; and the disk.

    `micro_batch` is the largest of the plan. The disk is not known of a model that cannot be
    traced.
    """
    recipe, machine = estimator.recipe, estimator.machine
    lines: list[MemoryLine] = []
    notes = [METHOD, NOT_COUNTED]
    disk = None
    for tuning in _tunings(recipe):
        found = estimator.estimate(
            tuning, micro_batch, recomputes=recipe.train.gradient_checkpointing
        )
        if isinstance(found, Untraceable):
            notes.insert(0, f"{tuning.kind}: could not be estimated: {found.reason}")
            continue
        is_own = tuning is recipe.tuning
        own = own_sharing(recipe, machine.gpus) if is_own else None
        lines += lines_of(tuning.kind, found.job, machine, own)
        if is_own:
            need = estimate_disk(found.model, found.job.optimizer, estimator.tokenizer)
            disk = disk_facts(recipe, need, plan)
            notes.insert(0, found.described)
            notes += keep_notes(recipe, count_parameters(found.model)[0])
    return MemoryFacts(str(machine), lines, notes), disk


def own_sharing(recipe: Recipe, gpus: int) -> Sharing:
    """How the recipe shares out on so many GPUs."""
    section = recipe.distributed.deepspeed
    if section is None:
        return Sharing(gpus)
    zero = deepspeed_settings(section)["zero_optimization"]
    place = zero.get("offload_optimizer", {}).get("device", "none")
    return Sharing(gpus, zero["stage"], offload=place != "none")


def lines_of(
    kind: str, job: Job, machine: Machine, own: Sharing | None = None
) -> Iterator[MemoryLine]:
    """One line for each way to share out that makes sense on the machine, and for the recipe's."""
    layouts = [Sharing(machine.gpus)] if machine.is_cpu else sharings_for(machine.gpus)
    if own is not None and own not in layouts:
        layouts.append(own)
    for layout in layouts:
        if job.stored is not None and layout.stage == 3:
            continue  # ZeRO-3 cannot gather weights of which several numbers share a byte
        need = memory_per_gpu(job, layout)
        no_room = machine.host is not None and need.host * machine.gpus > machine.host
        fits = need.peak <= machine.room and not no_room
        parts = asdict(need) | {"peak": need.peak}
        yield MemoryLine(kind, str(layout), **parts, fits=fits, is_own=layout == own)


def _form(tuning: Tuning) -> str:
    """What of a tuning an update depends on: quantized or not, an adapter is trained alike."""
    return tuning.model_dump_json(exclude={"quant_type", "double_quant"}).replace("qlora", "lora")


def recipe_config(recipe: Recipe, tokenizer: Any) -> Any:
    """The config of the recipe's model, also before its base has been trained."""
    if recipe.model.scratch is not None:
        return make_config(recipe.model.scratch.config, tokenizer)
    stale = stale_base(recipe)
    if stale is not None:
        return recipe_config(stale[0], tokenizer)
    source = base_source(recipe)
    return read_config(source, trust_remote_code=recipe.model.trust_remote_code)


def _tunings(recipe: Recipe) -> list[Tuning]:
    """The recipe's own, and those that people ask about."""
    own = recipe.tuning
    if recipe.model.scratch is not None:
        return [own]
    if isinstance(own, AdapterTuning) and own.adapter is not None:
        # The adapter's own shape counts; it is read when it is attached.
        return [own]
    others: list[Tuning] = [LoraTuning(), QloraTuning(kind="qlora")]
    others += [FreezeTuning(kind="freeze"), FullTuning(kind="full")]
    return [own, *(other for other in others if other.kind != own.kind)]
