"""Estimated memory of a run on fake tensors, and the changes that would save most."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch

from yrunner.assembly.distillation.teacher import teacher_facts
from yrunner.assembly.preflight import DiskFacts, disk_facts
from yrunner.assembly.run import Run
from yrunner.assembly.trainer import has_base_beneath, layout_for
from yrunner.console import counted
from yrunner.data.batching.collate import collate
from yrunner.data.batching.plan import Plan
from yrunner.data.conversation import TokenizedExample
from yrunner.distributed.topology import topology_of
from yrunner.errors import ModelError, YRunnerError
from yrunner.machine import cgroup_memory
from yrunner.models.load import check_vocabulary, choose_dtype
from yrunner.models.meta import build_fake_model
from yrunner.models.quantization import bytes_per_weight
from yrunner.models.size import count_weights_of, estimate_disk
from yrunner.models.tuning import count_parameters, ids_to_train
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
from yrunner.recipe.schema.rl import PpoLoss
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.deepspeed.config import deepspeed_settings
from yrunner.training.memory.trace import (
    METHOD,
    NOT_COUNTED,
    Untraceable,
    trace_update,
)
from yrunner.training.memory.zero import Sharing, Workload, memory_per_gpu, sharings_for

EWC_BYTES = 8
"""Per trained weight: its Fisher information and its start, both in float32."""
TOP_BYTES = 8
"""Per stored token of the base: its id and its logarithm."""
MIB = 2**20
UNITS = {"": 1e9, "M": 1e6, "MB": 1e6, "MIB": 2**20, "G": 1e9, "GB": 1e9, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Z]*)")
CONTEXT = 5 * 10**8
"""Approximate bytes that CUDA itself takes on a GPU."""
IN_USE = 0.95
"""Share of a GPU's memory that is usable; the rest is lost to fragmentation."""
LIKE_OTHERS = {
    "adamw_8bit": ("adamw_torch", 0.25),
    "paged_adamw_8bit": ("adamw_torch", 0.25),
    "paged_adamw_32bit": ("adamw_torch", 1.0),
}
"""Optimizers that need real values: a similar one that does not, and the share of its memory that
they take. Paged ones are counted as if nothing were moved to host memory."""
MOST = 3
"""Savings that are reported."""
NOT_COMPARED = "it fits here, so other kinds of tuning were not estimated; --memory 24GB does"
SMALLEST_SAVING = 0.01
"""Share of the peak below which a saving is not reported."""


@dataclass(frozen=True)
class Machine:
    """The number of devices that train together, and their memory."""

    gpus: int
    memory: int
    """Bytes per device."""
    is_cpu: bool = False
    host: int | None = None
    """Bytes of host memory, if known."""

    @property
    def room(self) -> int:
        """Bytes that training can use on each device."""
        return self.memory if self.is_cpu else round(IN_USE * self.memory) - CONTEXT

    def __str__(self) -> str:
        size = f"{self.memory / 1e9:.4g} GB"
        if self.is_cpu:
            return f"this machine without a GPU, {size}"
        return f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} of {size}"


def choose_machine(gpus: int | None, memory: str | None, processes: int = 1) -> Machine:
    """The machine with `gpus` GPUs of this memory; default: this machine.

    A recipe with several `processes` takes one GPU for each. Raises `YRunnerError` if `memory` is
    not a size, or is missing while this machine has no GPU.
    """
    here = this_machine()
    if gpus is not None and memory is None and here.is_cpu:
        raise YRunnerError(
            f"--gpus {gpus} needs --memory, because this machine has no GPU",
            remedy=f"add it: --gpus {gpus} --memory 80GB",
        )
    number = gpus or (processes if processes > 1 else here.gpus)
    if memory is not None:
        return Machine(number, as_bytes(memory))
    if here.is_cpu:
        # All processes share the host memory.
        return replace(here, gpus=number, memory=here.memory // number)
    return here if number == here.gpus else Machine(number, here.memory)


def count_ranks(distributed: DistributedSection, gpus: int | None) -> int:
    """The world size of a run on this machine, or on one with `gpus` GPUs."""
    return topology_of(distributed, gpus or torch.cuda.device_count()).num_ranks


def this_machine() -> Machine:
    """The GPUs of this machine, each counted as the smallest one, or its CPU."""
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
        raise YRunnerError(f'"{text}" is not a memory size', remedy="write it like 80GB")
    return round(float(match[1]) * UNITS[match[2]])


@dataclass(frozen=True)
class MemoryLine:
    """What each device holds at its peak, in bytes."""

    tuning: str
    layout: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    host: int
    """Host memory per device."""
    peak: int
    fits: bool
    is_own: bool
    """Whether this is how the recipe trains."""


@dataclass(frozen=True)
class MemoryFacts:
    """What each device needs, for the recipe's tuning and others."""

    machine: str
    """The machine it has to fit on."""
    lines: list[MemoryLine]
    notes: list[str]


@dataclass(frozen=True)
class Estimate:
    """One traced update for one kind of tuning."""

    workload: Workload
    model: Any
    """On fake tensors, without weights."""
    described: str
    """The micro-batch of the update."""


class Estimator:
    """Traces updates of a recipe's model on fake tensors, each one once."""

    def __init__(self, run: Run, machine: Machine) -> None:
        self.run, self.recipe, self.machine = run, run.recipe, machine
        self._traced: dict[tuple[str, int, bool], Estimate | Untraceable] = {}
        self.config = run.config
        self.teacher = teacher_facts(run)

    @property
    def beside(self) -> int:
        """Bytes of a teacher's weights on each device."""
        return 0 if self.teacher is None else self.teacher.memory

    def estimate(
        self, tuning: Tuning, micro_batch: Sequence[TokenizedExample], *, recomputes: bool
    ) -> Estimate | Untraceable:
        """Trace an update on `micro_batch`; `recomputes`: with gradient checkpointing."""
        key = (_form(tuning), id(micro_batch), recomputes)
        if key not in self._traced:
            self._traced[key] = self._run(tuning, micro_batch, recomputes)
        found = self._traced[key]
        if isinstance(found, Untraceable):
            return found
        stored = None
        if (own := self.run.stored_quantization) is not None:
            stored = own.bytes_per_weight
        elif isinstance(tuning, QloraTuning):
            stored = bytes_per_weight(tuning.quant_type, double_quant=tuning.double_quant)
        if stored is None:
            return found
        return replace(found, workload=replace(found.workload, stored=stored))

    def dtype_of(self, tuning: Tuning) -> torch.dtype:
        """The dtype of a training with this tuning, on the machine that is planned for."""
        name = self.recipe.model.dtype
        if name != "auto":
            return choose_dtype(name)
        if not self.machine.is_cpu:
            return torch.bfloat16  # the planned machine may have a GPU even if this one has none
        return self.run.variant(_with(self.recipe, tuning=tuning)).dtype

    def _run(
        self, tuning: Tuning, micro_batch: Sequence[TokenizedExample], recomputes: bool
    ) -> Estimate | Untraceable:
        recipe, dtype = self.recipe, self.dtype_of(tuning)
        # New weights are float32; loaded ones have the dtype of the computation.
        build = partial(
            build_fake_model,
            tuning=tuning,
            dtype=dtype if recipe.model.scratch is None else torch.float32,
            token_ids=ids_to_train(tuning, self.run.tokenizer),
            attention=recipe.model.attention,
            trust_remote_code=recipe.model.trust_remote_code,
            critic=isinstance(recipe.loss, PpoLoss),
        )
        model = build(self.config)
        check_vocabulary(model, self.run.tokenizer)
        counts = count_weights_of(model)
        # Assume that the model isolates examples; only the run itself can try it on real weights.
        layout = layout_for(model.config, isolates=True)
        batch = collate(micro_batch, self.run.tokenizer.pad_token_id, layout)
        optimizer, optimizer_share = LIKE_OTHERS.get(
            recipe.train.optimizer, (recipe.train.optimizer, 1)
        )
        update = trace_update(
            model,
            build,
            batch,
            dtype=dtype,
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
            f"the largest micro-batch: {counted(len(micro_batch), 'example')} laid out as "
            f"{rows:,} x {length:,} tokens, {targets:,} targets; "
            f"computed in {str(dtype).removeprefix('torch.')}"
        )
        bucket = self.config.get_text_config().hidden_size ** 2
        workload = Workload(update, counts, dtype.itemsize, bucket, remembered=optimizer_share)
        return Estimate(workload, model, described)


def estimate_memory(
    estimator: Estimator, micro_batch: Sequence[TokenizedExample], plan: Plan, *, compares: bool
) -> tuple[MemoryFacts, DiskFacts | None]:
    """Memory per device for the recipe's tuning and for others, and disk space.

    `micro_batch` is the largest of the plan; a teacher in memory counts among the weights. Without
    `compares`, others are left out where the recipe's own tuning fits: each takes seconds. Disk
    space is None if the model cannot be traced.
    """
    recipe, machine = estimator.recipe, estimator.machine
    lines: list[MemoryLine] = []
    notes = [METHOD, NOT_COUNTED]
    disk = None
    for tuning in _tunings(estimator.run):
        try:
            found = estimator.estimate(
                tuning, micro_batch, recomputes=recipe.train.gradient_checkpointing
            )
        except ModelError as error:
            if tuning is recipe.tuning:
                raise
            found = Untraceable(error.message)  # another kind than the recipe's is only for advice
        if isinstance(found, Untraceable):
            notes.insert(0, f"{tuning.kind}: no estimate: {found.reason}")
            continue
        is_own = tuning is recipe.tuning
        own = own_sharing(recipe, machine.gpus) if is_own else None
        lines += lines_of(tuning.kind, found.workload, machine, own, estimator.beside)
        if is_own:
            need = estimate_disk(found.model, found.workload.optimizer, estimator.run.tokenizer)
            disk = disk_facts(estimator.run, need, plan)
            notes.insert(0, found.described)
            notes += keep_notes(recipe, count_parameters(found.model)[0])
            if not compares and any(line.fits and line.is_own for line in lines):
                notes.append(NOT_COMPARED)
                break
    return MemoryFacts(str(machine), lines, notes), disk


def keep_notes(recipe: Recipe, num_trained: int) -> list[str]:
    """Sentences on the memory of the recipe's `keep`, if it needs any."""
    match recipe.keep:
        case Ewc():
            size = num_trained * EWC_BYTES / MIB
            return [
                f"keep ewc: {size:,.1f} MiB more on each device, for the Fisher information and "
                f"the initial values of {num_trained:,} trained weights; half of that on disk"
            ]
        case SelfReplay(by="kl", top=top) | KeepRows(by="kl", top=top):
            if has_base_beneath(recipe):
                return [
                    "keep: the base is the model with its adapter switched off: one more forward "
                    "pass over the replay rows, no more weights"
                ]
            size = recipe.data.max_length * top * TOP_BYTES / MIB
            return [
                f"keep: the base's {top:,} most likely tokens are kept on disk and in host memory, "
                f"at most {size:,.2f} MiB for a row of {recipe.data.max_length:,} tokens"
            ]
    return []


def own_sharing(recipe: Recipe, gpus: int) -> Sharing:
    """How the recipe shards a run over `gpus` GPUs."""
    section = recipe.distributed.deepspeed
    if section is None:
        return Sharing(gpus)
    zero = deepspeed_settings(section)["zero_optimization"]
    device = zero.get("offload_optimizer", {}).get("device", "none")
    return Sharing(gpus, zero["stage"], offload=device != "none")


def lines_of(
    kind: str, workload: Workload, machine: Machine, own: Sharing | None = None, beside: int = 0
) -> Iterator[MemoryLine]:
    """One line for each sensible way to shard on this machine, and for the recipe's.

    `beside`: bytes of weights on each device that are not the model's.
    """
    sharings = [Sharing(machine.gpus)] if machine.is_cpu else sharings_for(machine.gpus)
    if own is not None and own not in sharings:
        sharings.append(own)
    for sharing in sharings:
        if workload.stored is not None and sharing.stage == 3:
            continue  # ZeRO-3 cannot gather weights that share bytes
        need = memory_per_gpu(workload, sharing)
        no_room = machine.host is not None and need.host * machine.gpus > machine.host
        need = replace(need, weights=need.weights + beside)
        fits = need.peak <= machine.room and not no_room
        parts = asdict(need) | {"peak": need.peak}
        yield MemoryLine(kind, str(sharing), **parts, fits=fits, is_own=sharing == own)


def _form(tuning: Tuning) -> str:
    """The part of a tuning that an update depends on; LoRA and QLoRA train the same adapter."""
    return tuning.model_dump_json(exclude={"quant_type", "double_quant"}).replace("qlora", "lora")


def _tunings(run: Run) -> list[Tuning]:
    """The recipe's tuning, and the common alternatives."""
    own = run.recipe.tuning
    if run.recipe.model.scratch is not None or run.stored_quantization is not None:
        return [own]
    if isinstance(own, AdapterTuning) and own.adapter is not None:
        # Its shape is that of the adapter, which is read when it is attached.
        return [own]
    others: list[Tuning] = [LoraTuning(), QloraTuning(kind="qlora")]
    others += [FreezeTuning(kind="freeze"), FullTuning(kind="full")]
    return [own, *(other for other in others if other.kind != own.kind)]


@dataclass(frozen=True)
class Saving:
    """A change of the recipe, as typed, and the bytes that it saves at the peak."""

    change: str
    saved: int


@dataclass(frozen=True)
class Variant:
    """The recipe with one key changed, and its largest micro-batch."""

    change: str
    """As typed."""
    recipe: Recipe
    micro_batch: Sequence[TokenizedExample]


def find_savings(run: Run, micro_batch: Sequence[TokenizedExample]) -> list[Saving]:
    """The changes that save most memory in the run's largest micro-batch, at most three.

    Estimated as in `yrun check`; none if the model cannot be traced.
    """
    own = _peak(run, micro_batch)
    if own is None:
        return []
    savings = []
    for variant in variants(run.recipe, micro_batch, run.dtype):
        peak = _peak(run.variant(variant.recipe), variant.micro_batch)
        if peak is not None and own - peak > SMALLEST_SAVING * own:
            savings.append(Saving(variant.change, own - peak))
    return sorted(savings, key=lambda saving: saving.saved, reverse=True)[:MOST]


def _peak(run: Run, micro_batch: Sequence[TokenizedExample]) -> int | None:
    recipe = run.recipe
    estimator = Estimator(run, this_machine())
    found = estimator.estimate(
        recipe.tuning, micro_batch, recomputes=recipe.train.gradient_checkpointing
    )
    if isinstance(found, Untraceable):
        return None
    return memory_per_gpu(found.workload, Sharing()).peak + estimator.beside


def variants(
    recipe: Recipe, micro_batch: Sequence[TokenizedExample], dtype: torch.dtype
) -> Iterator[Variant]:
    """Every change of one key that could save memory; `dtype`: of the training."""
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
    teacher = recipe.teacher
    if teacher is not None and teacher.top == "all" and not teacher.on_policy:
        stored = _with(recipe, teacher=_with(teacher, top=64))
        yield Variant("teacher.top=64", stored, micro_batch)
    if dtype == torch.float32:
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
