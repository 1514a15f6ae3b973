"""The recipe's `teacher`: does it fit, what does it cost, what does it predict for the rows?"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from yrunner.assembly.distillation.writing import AnswerWriter
from yrunner.assembly.run import Run
from yrunner.console import as_gigabytes, counted
from yrunner.data.batching.taught import TaughtBatches
from yrunner.losses.distillation import TeacherDivergence
from yrunner.losses.fused_head import attach
from yrunner.machine import free_memory
from yrunner.models.errors import about_the_teacher
from yrunner.models.limits import count_positions
from yrunner.models.load import load_model, without_zero3
from yrunner.models.local import local_folder, weight_files
from yrunner.models.meta import build_fake_model
from yrunner.models.quantization import bytes_per_weight, quantization_config, without_quantization
from yrunner.models.size import WeightCounts, count_weights_of
from yrunner.recipe.schema.model import FullTuning
from yrunner.recipe.schema.teacher import TeacherSection
from yrunner.scoring.stored_predictions import bytes_on_disk
from yrunner.training.distillation.teacher import Teacher, Teaching

MIXTURE = 0.5
"""Default of teacher.beta."""
ROOM_BESIDE_WEIGHTS = 1.25
"""Memory for scoring rows, per byte of weights."""
LONGEST_ANSWER = 128
"""Default of teacher.max_new_tokens."""


def divergence_of(run: Run) -> TeacherDivergence:
    """How student and teacher are compared: over the ids that the tokenizer has."""
    section = section_of(run)
    beta = MIXTURE if section.beta is None else section.beta
    return TeacherDivergence(section.by, beta, section.temperature, num_tokens(run))


def section_of(run: Run) -> TeacherSection:
    """The recipe's `teacher`."""
    assert run.recipe.teacher is not None, "a recipe without a teacher"
    return run.recipe.teacher


def num_tokens(run: Run) -> int:
    """Ids of the tokenizer: models have more embeddings, padded to different numbers."""
    return max(run.tokenizer.get_vocab().values()) + 1


def load_teacher_model(run: Run) -> Any:
    """The teacher, frozen, on the device. Raises `ModelError` if it cannot be loaded."""
    section = section_of(run)
    config = None
    if section.quantize != "none":
        config = quantization_config(section.quantize, double_quant=True, dtype=run.dtype)
    with about_the_teacher(), without_zero3():
        model: Any = load_model(
            run.teacher_source,
            dtype=run.dtype,
            attention=run.recipe.model.attention,
            trust_remote_code=run.trusts_teacher,
            quantization=config,
        )
    model.requires_grad_(False)
    if config is None:
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.config.use_cache = False
    attach(model)
    return model.eval()


def has_teacher_here(run: Run) -> bool:
    """Whether the recipe has a teacher whose weights are here and fit into memory."""
    if run.recipe.teacher is None or run.untrained_teacher is not None:
        return False
    folder = local_folder(run.teacher_source)
    files = [] if folder is None else weight_files(folder)
    needed = sum(file.stat().st_size for file in files)
    return bool(files) and ROOM_BESIDE_WEIGHTS * needed <= free_memory()


def bytes_stored(run: Run) -> int:
    """Size of the teacher's predictions on disk; 0 if they are not kept."""
    top = section_of(run).top
    if top == "all":
        return 0
    train, validation = run.dataset.train, run.dataset.validation
    targets = int(train.num_targets.sum()) + int(validation.num_targets.sum())
    return bytes_on_disk(targets, min(top, num_tokens(run)))


def teaching(run: Run, teacher: Teacher) -> Teaching:
    """How a student learns from this teacher."""
    writer = partial(_answer_writer, run) if section_of(run).on_policy else None
    return Teaching(teacher, divergence_of(run), writer)


def _answer_writer(run: Run, batches: TaughtBatches) -> AnswerWriter:
    section = section_of(run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    positions = count_positions(run.teacher_config) or run.recipe.data.max_length
    return AnswerWriter(
        batches,
        run.tokenizer,
        share=section.on_policy,
        seed=run.recipe.seed,
        max_new_tokens=section.max_new_tokens or LONGEST_ANSWER,
        max_length=min(run.recipe.data.max_length, positions),
        autocast=lambda: torch.autocast(
            device, dtype=run.dtype, enabled=run.dtype != torch.float32
        ),
    )


def teacher_in_words(run: Run) -> str | None:
    """The teacher and how it is learned from; None without one."""
    section = run.recipe.teacher
    if section is None:
        return None
    name = section.model if run.teacher is None else run.teacher.recipe.name
    parts = [name, f"weight {section.weight:g}", section.by.replace("_kl", " KL")]
    if section.temperature != 1:
        parts.append(f"temperature {section.temperature:g}")
    if section.top == "all":
        parts.append("beside the model")
    else:
        parts.append(f"{counted(section.top, 'most likely token')}, kept on disk")
    if section.on_policy:
        parts.append(f"the model writes {section.on_policy:.0%} of the answers")
    return ", ".join(parts)


def _count(config: Any, run: Run, trust_remote_code: bool) -> WeightCounts:
    """The weights of a model, without loading it."""
    whole = FullTuning(kind="full")
    return count_weights_of(
        build_fake_model(
            without_quantization(config),
            whole,
            dtype=run.dtype,
            trust_remote_code=trust_remote_code,
        )
    )


@dataclass(frozen=True)
class TeacherFacts:
    """What a teacher costs."""

    parameters: int
    memory: int
    """Bytes of its weights on each device while the student is trained; 0 if it is not there."""
    disk: int
    """Bytes of its predictions; 0 if they are not kept."""
    sentence: str


def teacher_facts(run: Run) -> TeacherFacts | None:
    """None without a teacher."""
    section = run.recipe.teacher
    if section is None:
        return None
    counts = _count(run.teacher_config, run, run.trusts_teacher)
    own = _count(run.config, run, run.recipe.model.trust_remote_code).total
    stored = float(run.dtype.itemsize)
    if section.quantize != "none":
        stored = bytes_per_weight(section.quantize, double_quant=True)
    size = round((counts.total - counts.in_layers) * run.dtype.itemsize + counts.in_layers * stored)
    words = f"teacher: {counts.total:,} parameters, {counts.total / own:.2g} times the model's"
    disk = bytes_stored(run)
    if section.top == "all":
        words += (
            f"; beside the model, {as_gigabytes(size)} more on each device and one more forward "
            "pass over every micro-batch"
        )
        if section.on_policy:
            words += f"; the model writes {section.on_policy:.0%} of the answers of each update"
        return TeacherFacts(counts.total, size, disk, words)
    words += (
        f"; one forward pass over all rows before training, then {as_gigabytes(disk)} on disk in "
        f"{run.folder.prepared} and none in memory"
    )
    return TeacherFacts(counts.total, 0, disk, words)
