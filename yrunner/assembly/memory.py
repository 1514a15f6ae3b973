"""What a run needs of memory, found without loading a weight, and what would save most of it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch

from yrunner.assembly.preflight import DiskFacts, disk_facts
from yrunner.assembly.run import Run
from yrunner.assembly.trainer import has_base_beneath, layout_for
from yrunner.data.batching.collate import collate
from yrunner.data.batching.plan import Plan
from yrunner.data.conversation import TokenizedExample
from yrunner.distributed.topology import topology_of
from yrunner.errors import YRunnerError
from yrunner.models.load import check_vocabulary, choose_dtype
from yrunner.models.local import cgroup_memory
from yrunner.models.meta import build_fake_model
from yrunner.models.quantization import bytes_per_weight
from yrunner.models.size import count_weights_of, estimate_disk
from yrunner.models.tuning import count_parameters
from yrunner.recipe.schema.distributed import DistributedSection
from yrunner.recipe.schema.keep import Ewc, KeepRows, SelfReplay
from yrunner.recipe.schema.model import (
    AdapterTuning,
    FreezeTuning,
    FullTuning,
    LoraTuning,
    QloraTuning,
    Tuning,
)
from yrunner.recipe.schema.recipe import Recipe
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.deepspeed.config import deepspeed_settings
from yrunner.training.memory.trace import (
    METHOD,
    NOT_COUNTED,
    Untraceable,
    trace_update,
)
from yrunner.training.memory.zero import Sharing, Workload, memory_per_gpu, sharings_for

BYTES_OF_A_SPRING = 8
"""Fisher information and start of a trained weight, both in float32."""
BYTES_OF_A_TOKEN = 8
"""Id and logarithm of one of the base's likeliest tokens."""
MIB = 2**20


def keep_notes(recipe: Recipe, num_trained: int) -> list[str]:
    """Sentences for the recipe's `keep`; none where it holds on to nothing."""
    match recipe.keep:
        case Ewc():
            size = num_trained * BYTES_OF_A_SPRING / MIB
            return [
                f"keep ewc: {size:,.1f} MiB more on each device, for the Fisher information and "
                f"the start of {num_trained:,} trained weights; half of that on disk"
            ]
        case SelfReplay(by="kl", top=top) | KeepRows(by="kl", top=top):
            if has_base_beneath(recipe):
                return [
                    "keep: the base is the model with its adapter off; a forward pass more for "
                    "the kept rows, and no weight"
                ]
            size = recipe.data.max_length * top * BYTES_OF_A_TOKEN / MIB
            return [
                f"keep: the base's {top:,} likeliest tokens lie on disk and in the machine's "
                f"memory, at most {size:,.2f} MiB for a row of {recipe.data.max_length:,} tokens"
            ]
    return []


UNITS = {"": 1e9, "M": 1e6, "MB": 1e6, "MIB": 2**20, "G": 1e9, "GB": 1e9, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Z]*)")
CONTEXT = 5 * 10**8
"""Bytes of a GPU that CUDA takes for itself, about."""
IN_USE = 0.95
"""Share of a GPU's memory that the allocator can give out before fragments are in its way."""


@dataclass(frozen=True)
class Machine:
    """How many devices train together, and what each of them can hold."""

    gpus: int
    memory: int
    """Bytes of each."""
    is_cpu: bool = False
    host: int | None = None
    """Bytes of the machine's own memory, where they are known."""

    @property
    def room(self) -> int:
        """Bytes that training may take on each device."""
        return self.memory if self.is_cpu else round(IN_USE * self.memory) - CONTEXT

    def __str__(self) -> str:
        size = f"{self.memory / 1e9:.4g} GB"
        if self.is_cpu:
            return f"this machine without a GPU, {size}"
        return f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} of {size}"


def choose_machine(gpus: int | None, memory: str | None, processes: int = 1) -> Machine:
    """The machine with so many GPUs of so much memory; what is not given is that of this one.

    A recipe with several `processes` takes a GPU for each. Raises `YRunnerError` where the memory
    is no size, or is not given and there is no GPU here.
    """
    here = this_machine()
    if gpus is not None and memory is None and here.is_cpu:
        raise YRunnerError(
            f"--gpus {gpus} says nothing of their memory, and this machine has none to look at",
            remedy=f"add it: --gpus {gpus} --memory 80GB",
        )
    number = gpus or (processes if processes > 1 else here.gpus)
    if memory is not None:
        return Machine(number, as_bytes(memory))
    if here.is_cpu:
        # All processes share the one memory.
        return replace(here, gpus=number, memory=here.memory // number)
    return here if number == here.gpus else Machine(number, here.memory)


def count_ranks(distributed: DistributedSection, gpus: int | None) -> int:
    """Processes of a run on this machine, or on one with so many GPUs."""
    return topology_of(distributed, gpus or torch.cuda.device_count()).num_ranks


def this_machine() -> Machine:
    """The GPUs of this machine, the smallest for all, or its CPU."""
    container = cgroup_memory()
    host = psutil.virtual_memory().total if container is None else container.limit
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        return Machine(1, host, is_cpu=True)
    memory = min(torch.cuda.mem_get_info(number)[1] for number in range(num_gpus))
    return Machine(num_gpus, memory, host=host)


def as_bytes(text: str) -> int:
    """`80GB`, `80`, `79.6 GiB` as bytes. Raises `YRunnerError` for anything else."""
    match = _SIZE.fullmatch(text.strip().upper())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise YRunnerError(f'"{text}" is no size of a memory', remedy="write it like 80GB")
    return round(float(match[1]) * UNITS[match[2]])


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

    job: Workload
    model: Any
    """Weightless."""
    described: str
    """The micro-batch that it was found with."""


class Estimator:
    """Runs updates of a recipe's model that have no values, each of them once."""

    def __init__(self, run: Run, machine: Machine) -> None:
        self.run, self.recipe, self.machine = run, run.recipe, machine
        self._kept: dict[tuple[str, int, bool], Estimate | Untraceable] = {}
        self.config = run.config
        is_planned = self.recipe.model.dtype == "auto" and not machine.is_cpu
        # A machine to rent may have a GPU where this one has none.
        self.dtype = torch.bfloat16 if is_planned else choose_dtype(self.recipe.model.dtype)

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
        stored = bytes_per_weight(tuning.quant_type, double_quant=tuning.double_quant)
        return replace(found, job=replace(found.job, stored=stored))

    def _run(
        self, tuning: Tuning, micro_batch: Sequence[TokenizedExample], recomputes: bool
    ) -> Estimate | Untraceable:
        recipe = self.recipe
        # Weights from scratch are made in float32, loaded ones in the dtype of the computation.
        build = partial(
            build_fake_model,
            tuning=tuning,
            dtype=self.dtype if recipe.model.scratch is None else torch.float32,
            attention=recipe.model.attention,
            trust_remote_code=recipe.model.trust_remote_code,
        )
        model = build(self.config)
        check_vocabulary(model, self.run.tokenizer)
        counts = count_weights_of(model)
        # As if the model kept examples apart, which the run tries out on its weights.
        layout = layout_for(model.config, isolates=True)
        batch = collate(micro_batch, self.run.tokenizer.pad_token_id, layout)
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
        job = Workload(update, counts, self.dtype.itemsize, bucket, remembered=remembered)
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
            need = estimate_disk(found.model, found.job.optimizer, estimator.run.tokenizer)
            disk = disk_facts(estimator.run, need, plan)
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
    kind: str, job: Workload, machine: Machine, own: Sharing | None = None
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


MOST = 3
"""Keys that are named."""
SMALLEST_SAVING = 0.01
"""Of the peak: less is not worth a word."""


@dataclass(frozen=True)
class Saving:
    """A change of the recipe, as it is typed, and the bytes that it saves at the peak."""

    change: str
    saved: int


@dataclass(frozen=True)
class Variant:
    """The recipe with one key changed, and what its largest micro-batch is then."""

    change: str
    """As it is typed."""
    recipe: Recipe
    micro_batch: Sequence[TokenizedExample]


def find_savings(run: Run, micro_batch: Sequence[TokenizedExample]) -> list[Saving]:
    """The changes that save most in the run's largest micro-batch, the best first, at most three.

    Estimated as `yrun check` estimates memory; none where the model cannot be traced.
    """
    own = _peak(run, micro_batch)
    if own is None:
        return []
    savings = []
    for variant in variants(run.recipe, micro_batch):
        peak = _peak(run.variant(variant.recipe), variant.micro_batch)
        if peak is not None and own - peak > SMALLEST_SAVING * own:
            savings.append(Saving(variant.change, own - peak))
    return sorted(savings, key=lambda saving: saving.saved, reverse=True)[:MOST]


def _peak(run: Run, micro_batch: Sequence[TokenizedExample]) -> int | None:
    recipe = run.recipe
    found = Estimator(run, this_machine()).estimate(
        recipe.tuning, micro_batch, recomputes=recipe.train.gradient_checkpointing
    )
    return None if isinstance(found, Untraceable) else memory_per_gpu(found.job, Sharing()).peak


def variants(recipe: Recipe, micro_batch: Sequence[TokenizedExample]) -> Iterator[Variant]:
    """Every change of one key that could save memory."""
    train, model = recipe.train, recipe.model

    def with_train(change: str, **keys: Any) -> Variant:
        return Variant(change, _with(recipe, train=_with(train, **keys)), micro_batch)

    if not train.gradient_checkpointing:
        yield with_train("train.gradient_checkpointing=true", gradient_checkpointing=True)
    if train.batch_size > 1 and len(micro_batch) > 1:
        rows, steps = train.batch_size // 2, 2 * train.gradient_accumulation_steps
        halved = with_train(
            f"train.batch_size={rows} with train.gradient_accumulation_steps={steps}",
            batch_size=rows,
            gradient_accumulation_steps=steps,
        )
        yield replace(halved, micro_batch=micro_batch[: -(-len(micro_batch) // 2)])
    if train.optimizer != "adafactor" and recipe.distributed.deepspeed is None:
        yield with_train("train.optimizer=adafactor", optimizer="adafactor")
    if recipe.tuning.kind in ("full", "freeze") and model.scratch is None:
        lora = _with(recipe, tuning=LoraTuning())
        yield Variant("tuning.kind=lora", lora, micro_batch)
    if choose_dtype(model.dtype) == torch.float32:
        half = _with(recipe, model=_with(model, dtype="bfloat16"))
        yield Variant("model.dtype=bfloat16", half, micro_batch)
    length = max(len(example.input_ids) for example in micro_batch) // 2
    cut = [_cut(example, length) for example in micro_batch]
    if all(any(label != IGNORE_INDEX for label in example.labels) for example in cut):
        yield Variant(f"data.max_length={length} with data.too_long=cut", recipe, cut)


def _with(section: Any, **keys: Any) -> Any:
    return section.model_copy(update=keys)


def _cut(example: TokenizedExample, length: int) -> TokenizedExample:
    return TokenizedExample(example.input_ids[:length], example.labels[:length], example.origin)
