"""The recipe's `teacher`: does it fit, what does it cost, what does it predict for the rows?"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from yrunner.assembly.run import Run
from yrunner.console import as_gigabytes, counted, progress, say
from yrunner.data.batching.batches import Batches
from yrunner.data.batching.taught import TaughtBatches
from yrunner.data.dataset.cache import Cache
from yrunner.data.dataset.row_report import num_rows
from yrunner.errors import DataError, MissingError, ModelError, RunError
from yrunner.losses.distillation import Divergence
from yrunner.losses.fused_head import attach
from yrunner.machine import free_memory
from yrunner.models.limits import check_lengths, count_positions
from yrunner.models.load import check_ids, load_model, load_tokenizer, without_zero3
from yrunner.models.local import local_folder, weight_files
from yrunner.models.meta import build_fake_model, read_config
from yrunner.models.model_key import model_key
from yrunner.models.quantization import bytes_per_weight, quantization_config, without_quantization
from yrunner.models.size import WeightCounts, count_weights_of
from yrunner.recipe.schema.model import FullTuning
from yrunner.recipe.schema.teacher import TeacherSection
from yrunner.scoring.score_file import row_hashes
from yrunner.scoring.stored_predictions import (
    FILES,
    StoredPredictions,
    bytes_on_disk,
    store_predictions,
)
from yrunner.storage.run_dir import free_bytes, read_json, write_json
from yrunner.training.distillation.teacher import LiveTeacher, StoredTeacher
from yrunner.training.distillation.writing import AnswerWriter

MIXTURE = 0.5
"""Default of teacher.beta."""
ROOM_BESIDE_WEIGHTS = 1.25
"""Memory for scoring rows, per byte of weights."""
LONGEST_ANSWER = 128
"""Default of teacher.max_new_tokens."""
MOST_NAMED = 3
"""Tokens that are named where two tokenizers differ."""


def divergence_of(run: Run) -> Divergence:
    """How student and teacher are compared: over the ids that the tokenizer has."""
    section = section_of(run)
    beta = MIXTURE if section.beta is None else section.beta
    return Divergence(section.by, beta, section.temperature, num_tokens(run))


def section_of(run: Run) -> TeacherSection:
    """The recipe's `teacher`."""
    assert run.recipe.teacher is not None, "a recipe without a teacher"
    return run.recipe.teacher


def num_tokens(run: Run) -> int:
    """Ids of the tokenizer: models have more embeddings, padded to different numbers."""
    return max(run.tokenizer.get_vocab().values()) + 1


def teacher_config(run: Run) -> Any:
    """The teacher's config, also before a recipe's result exists."""
    if run.untrained_teacher is not None:
        return run.untrained_teacher.config
    return read_config(run.teacher_source, trust_remote_code=_trusts_code(run))


def _teacher_tokenizer(run: Run) -> Any:
    if run.untrained_teacher is not None:
        return run.untrained_teacher.tokenizer
    return load_tokenizer(run.teacher_source, trust_remote_code=_trusts_code(run))


def _trusts_code(run: Run) -> bool:
    """Code of a teacher runs only where its own recipe trusts it."""
    return run.teacher is not None and run.teacher.recipe.model.trust_remote_code


def check_teacher(run: Run) -> None:
    """Raise `ModelError` if the teacher has another tokenizer, or too few positions for a row."""
    if run.recipe.teacher is None:
        return
    name = run.recipe.teacher.model
    with _about_the_teacher():
        config, tokenizer = teacher_config(run), _teacher_tokenizer(run)
        check_ids(tokenizer, config.get_text_config().vocab_size)
    if difference := difference_of(run.tokenizer.get_vocab(), tokenizer.get_vocab()):
        raise ModelError(
            f"the teacher {name} has another tokenizer than the model: {difference}",
            remedy="use a teacher of the same family",
        )
    with _about_the_teacher():
        for rows in (run.dataset.train, run.dataset.validation):
            check_lengths(rows.examples.lengths, rows.examples.origin, config)


def difference_of(student: dict[str, int], teacher: dict[str, int]) -> str | None:
    """The first ids that stand for different tokens, in words; None if the tokenizers agree."""
    theirs, others = ({id_: token for token, id_ in each.items()} for each in (student, teacher))
    different = [
        id_ for id_ in sorted(theirs.keys() | others.keys()) if theirs.get(id_) != others.get(id_)
    ]
    if not different:
        return None
    named = ", ".join(
        f"id {id_} is {_named(theirs.get(id_))} in the model's and {_named(others.get(id_))} in "
        "the teacher's"
        for id_ in different[:MOST_NAMED]
    )
    more = len(different) - MOST_NAMED
    return f"{named}, and {counted(more, 'more id')} differ" if more > 0 else named


def _named(token: str | None) -> str:
    return "no token" if token is None else json.dumps(token, ensure_ascii=False)


@contextmanager
def _about_the_teacher() -> Iterator[None]:
    """Errors in loading it name the key of the recipe."""
    try:
        yield
    except MissingError as error:
        raise MissingError(f"teacher.model: {error.message}", remedy=error.remedy) from error
    except ModelError as error:
        remedy = "check teacher.model" if error.remedy == "check model.base" else error.remedy
        raise ModelError(f"teacher.model: {error.message}", remedy=remedy) from error
    except DataError as error:
        raise ModelError(f"teacher.model: {error.message}", remedy=error.remedy) from error


def load_teacher_model(run: Run) -> Any:
    """The teacher, frozen, on the device. Raises `ModelError` if it cannot be loaded."""
    section = section_of(run)
    config = None
    if section.quantize != "none":
        config = quantization_config(section.quantize, double_quant=True, dtype=run.dtype)
    with _about_the_teacher(), without_zero3():
        model: Any = load_model(
            run.teacher_source,
            dtype=run.dtype,
            attention=run.recipe.model.attention,
            trust_remote_code=_trusts_code(run),
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


def load_teacher(run: Run) -> LiveTeacher | None:
    """The teacher of a recipe that runs it beside the student; None for any other."""
    section = run.recipe.teacher
    return LiveTeacher(load_teacher_model(run)) if section and section.top == "all" else None


def prepare_teacher(run: Run) -> StoredTeacher | None:
    """The teacher's likeliest tokens for all rows, computed once, then read from disk.

    None without a teacher, and for one that runs beside the student. Call it before the process
    group is initialised: waiting in it can time out.
    """
    section = run.recipe.teacher
    if section is None or section.top == "all":
        return None
    train, validation = run.dataset.train, run.dataset.validation
    counts_E = np.concatenate([train.num_targets, validation.num_targets])
    rows, cache = num_rows(len(counts_E)), Cache(run.folder.prepared, FILES)
    key = f"teacher-{_key(run)}"
    run.folder.prepared.mkdir(parents=True, exist_ok=True)
    with FileLock(run.folder.prepared / f".{key}.lock"):
        entry = cache.find(key)
        if entry is None:
            _check_room(run)
            with cache.writing() as partial:
                _predict(run, partial)
                entry = cache.complete(key, partial, {"teacher": section.model, "rows": rows})
        else:
            say(f"teacher: predictions for {rows} found in {entry}")
    found = StoredPredictions.open(entry, counts_E)
    say(
        f"teacher: its {counted(found.ids_NK.shape[1], 'most likely token')} for each target of "
        f"{rows}; all others together have {found.mean_rest:.2%} of its probability"
    )
    return StoredTeacher(found)


def _predict(run: Run, folder: Path) -> None:
    section = section_of(run)
    assert section.top != "all"
    model = load_teacher_model(run)
    train, validation = run.dataset.train, run.dataset.validation
    total = len(train) + len(validation)
    with progress("predictions of the teacher, rows", total) as advance:
        store_predictions(
            folder,
            model,
            _Joined(train, validation),
            advance=advance,
            top=min(section.top, num_tokens(run)),
            temperature=section.temperature,
            num_tokens=num_tokens(run),
            pad_token_id=run.tokenizer.pad_token_id,
            max_tokens=run.max_tokens,
        )


class _Joined:
    """Training rows, then validation rows; read slice by slice."""

    def __init__(self, *parts: Any) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, chosen: slice) -> list[Any]:
        found = []
        for index in range(*chosen.indices(len(self))):
            for part in self._parts:
                if index < len(part):
                    found.append(part[index])
                    break
                index -= len(part)
        return found


def _key(run: Run) -> str:
    section = section_of(run)
    rows = chain(run.dataset.train, run.dataset.validation)
    facts = [
        model_key(run.teacher_source),
        row_hashes(rows),
        section.top,
        section.temperature,
        section.quantize,
        num_tokens(run),
        str(run.dtype),
    ]
    return sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _check_room(run: Run) -> None:
    needed, free = _bytes_stored(run), free_bytes(run.folder.prepared)
    if needed > free:
        raise RunError(
            f"{run.folder.prepared} has {as_gigabytes(free)} free, but the teacher's predictions "
            f"need {as_gigabytes(needed)}",
            remedy="free some space, or make teacher.top smaller",
        )


def _bytes_stored(run: Run) -> int:
    """Size of the teacher's predictions on disk; 0 if they are not kept."""
    top = section_of(run).top
    if top == "all":
        return 0
    train, validation = run.dataset.train, run.dataset.validation
    targets = int(train.num_targets.sum()) + int(validation.num_targets.sum())
    return bytes_on_disk(targets, min(top, num_tokens(run)))


def answer_writer(run: Run, batches: Batches) -> AnswerWriter | None:
    """Lets the student write answers in the place of rows; None for a recipe without any."""
    section = section_of(run)
    if not section.on_policy:
        return None
    assert isinstance(batches, TaughtBatches)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    positions = count_positions(teacher_config(run)) or run.recipe.data.max_length
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


def record_teacher(run: Run) -> None:
    """Record which model teaches. Raises `RunError` if a resumed run has another one."""
    if run.recipe.teacher is None:
        return
    content = {"key": model_key(run.teacher_source)}
    run_dir, resumes = run.folder, run.options.from_step is not None
    if resumes and run_dir.teacher.exists() and read_json(run_dir.teacher) != content:
        raise RunError(
            f"the teacher {run.recipe.teacher.model} has changed since {run_dir.folder} was "
            "started",
            remedy="restore it, or start over with --overwrite",
        )
    write_json(run_dir.teacher, content)


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
    counts = _count(teacher_config(run), run, _trusts_code(run))
    own = _count(run.config, run, run.recipe.model.trust_remote_code).total
    stored = float(run.dtype.itemsize)
    if section.quantize != "none":
        stored = bytes_per_weight(section.quantize, double_quant=True)
    size = round((counts.total - counts.in_layers) * run.dtype.itemsize + counts.in_layers * stored)
    words = f"teacher: {counts.total:,} parameters, {counts.total / own:.2g} times the model's"
    disk = _bytes_stored(run)
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
