"""What a run compares its model with: regulariser, drift measure, reference and teacher."""

import json
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, assert_never

import torch
from filelock import FileLock

from yrunner.assembly.distillation.teacher import (
    bytes_stored,
    load_teacher_model,
    num_tokens,
    section_of,
    teaching,
)
from yrunner.assembly.replay import RegulariserData, rows_key
from yrunner.assembly.run import Run
from yrunner.assembly.trainer import (
    compared_rows,
    has_base_beneath,
    score_reference,
    untrained_model,
)
from yrunner.console import as_gigabytes, counted, progress, say
from yrunner.data.batching.replay_rows import make_keep_plan
from yrunner.data.dataset.cache import Cache
from yrunner.data.dataset.examples import Examples
from yrunner.data.dataset.row_report import num_rows
from yrunner.errors import RunError
from yrunner.models.model_key import model_key
from yrunner.recipe.schema.keep import Ewc, KeepRows, NoKeep, SelfReplay
from yrunner.scoring.score_file import row_hashes
from yrunner.scoring.stored_predictions import FILES, StoredPredictions, store_predictions
from yrunner.storage.run_dir import free_bytes, read_json, write_json
from yrunner.training.distillation.teacher import LiveTeacher, StoredTeacher, Teaching
from yrunner.training.drift import DriftGauge
from yrunner.training.ewc import EwcPenalty, estimate_fisher, load_fisher, save_fisher
from yrunner.training.loop import Trainer
from yrunner.training.preference.answers import compares_with_reference
from yrunner.training.preference.reference import FILE, Reference
from yrunner.training.replay_loss import HeldRows, Regulariser


def add_regulariser(trainer: Trainer, run: Run, data: RegulariserData) -> None:
    """Add the recipe's regulariser (`keep`) and drift measure to a trainer before it starts."""
    trainer.objective.regulariser = _make_regulariser(trainer, run, data)
    if data.drift_rows:
        trainer.objective.gauge = DriftGauge(
            data.drift_rows,
            data.drift_tops,
            trainer.batches.pad_token_id,
            max_tokens=run.max_tokens,
        )


def record_rows(run: Run, data: RegulariserData) -> None:
    """Record in the run folder which rows the regulariser uses, if any.

    Raises `RunError` if a resumed run has other rows than before, perhaps edited by hand.
    """
    if not data.rows:
        return
    text = "".join(row_hashes(data.rows))
    content = {"rows": len(data.rows), "hash": sha256(text.encode()).hexdigest()}
    run_dir, resumes = run.folder, run.options.from_step is not None
    if resumes and run_dir.keep.exists() and read_json(run_dir.keep) != content:
        raise RunError(
            f"the rows for keep have changed since {run_dir.folder} was started",
            remedy="restore them, or start over with --overwrite",
        )
    write_json(run_dir.keep, content)


def _make_regulariser(trainer: Trainer, run: Run, data: RegulariserData) -> Regulariser | None:
    recipe, keep = run.recipe, run.recipe.keep
    match keep:
        case NoKeep():
            return None
        case SelfReplay() | KeepRows():
            lengths = [len(example.input_ids) for example in data.rows]
            keep_plan = make_keep_plan(
                [len(example.target_positions) for example in data.rows],
                lengths,
                per_update=trainer.plan.kept,
                seed=recipe.seed,
                pack_to=recipe.data.max_length if recipe.data.packing else None,
            )
            return HeldRows(
                data.rows,
                keep_plan,
                lanes=trainer.plan.lanes,
                strength=keep.strength,
                by_text=keep.by == "text",
                tops=data.row_tops,
                pad_token_id=trainer.batches.pad_token_id,
                layout=trainer.batches.layout,
            )
        case Ewc():
            return _make_ewc(run, keep.strength, data, trainer.model)
        case _:
            assert_never(keep)


def _make_ewc(run: Run, strength: float, data: RegulariserData, model: Any) -> EwcPenalty:
    recipe = run.recipe
    assert data.folder is not None, "EWC has rows"
    tuning = recipe.tuning.model_dump(mode="json")
    # The seed decides the random half of a new adapter.
    path = data.folder.fisher(rows_key(run, data.rows, tuning, recipe.seed, str(run.dtype)))
    data.folder.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(data.folder.lock):
        if not path.exists():
            with progress("estimating Fisher information, rows", len(data.rows)) as advance:
                fisher = estimate_fisher(
                    model, data.rows, pad_token_id=run.tokenizer.pad_token_id, advance=advance
                )
            save_fisher(fisher, path)
    return EwcPenalty(model, load_fisher(path, model), strength)


def prepare_reference(run: Run) -> Reference | None:
    """Log-probabilities of all answers as the run begins, computed once, then read from disk.

    None for a loss without a reference, and where the model with its adapter off is the reference.
    Call it before TrainingArguments are made, as `prepare_keep`.
    """
    recipe, tuning = run.recipe, run.recipe.tuning
    if not compares_with_reference(recipe.loss) or has_base_beneath(recipe):
        return None
    cache, adapter = Cache(run.folder.prepared, [FILE]), getattr(tuning, "adapter", None)
    rows = chain(run.dataset.train.examples, run.dataset.validation.examples)
    what = [
        "reference",
        recipe.loss.kind == "kto",
        len(run.dataset.validation),
        adapter and model_key(adapter),
        getattr(tuning, "quant_type", None),
        getattr(tuning, "double_quant", None),
        str(run.dtype),
    ]
    key = f"reference-{rows_key(run, rows, *what)}"
    run.folder.prepared.mkdir(parents=True, exist_ok=True)
    with FileLock(run.folder.prepared / f".{key}.lock"):
        entry = cache.find(key)
        if entry is None:
            with cache.writing() as partial:
                device = "cuda" if torch.cuda.is_available() else "cpu"
                model = untrained_model(run).to(device)
                score_reference(run, model, *compared_rows(run)).save(partial)
                entry = cache.complete(key, partial, {})
        else:
            say(f"reference: {num_rows(len(run.dataset.train))}, scored before")
        return Reference.load(entry)


def load_teacher(run: Run) -> Teaching | None:
    """The teacher of a recipe that runs it beside the student; None for any other."""
    section = run.recipe.teacher
    if section is None or section.top != "all":
        return None
    return teaching(run, LiveTeacher(load_teacher_model(run)))


def prepare_teacher(run: Run) -> Teaching | None:
    """The teacher's likeliest tokens for all rows, computed once, then read from disk.

    None without a teacher, and for one that runs beside the student. Call it before the process
    group is initialised: waiting in it can time out.
    """
    section = run.recipe.teacher
    if section is None or section.top == "all":
        return None
    examples = _taught_rows(run)
    rows, cache = num_rows(len(examples)), Cache(run.folder.prepared, FILES)
    key = f"teacher-{_key_of_teacher(run)}"
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
    found = StoredPredictions.open(entry, examples.num_targets)
    say(
        f"teacher: its {counted(found.ids_NK.shape[1], 'most likely token')} for each target of "
        f"{rows}; all others together have {found.mean_rest:.2%} of its probability"
    )
    return teaching(run, StoredTeacher(found))


def _taught_rows(run: Run) -> Examples:
    """Training rows, then validation rows, as `TaughtBatches` counts them."""
    return Examples.joined([run.dataset.train, run.dataset.validation])


def _predict(run: Run, folder: Path) -> None:
    section = section_of(run)
    assert section.top != "all"
    model = load_teacher_model(run)
    examples = _taught_rows(run)
    with progress("predictions of the teacher, rows", len(examples)) as advance:
        store_predictions(
            folder,
            model,
            examples,
            advance=advance,
            top=min(section.top, num_tokens(run)),
            temperature=section.temperature,
            num_tokens=num_tokens(run),
            pad_token_id=run.tokenizer.pad_token_id,
            max_tokens=run.max_tokens,
        )


def _key_of_teacher(run: Run) -> str:
    section = section_of(run)
    facts = [
        model_key(run.teacher_source),
        row_hashes(_taught_rows(run)),
        section.top,
        section.temperature,
        section.quantize,
        num_tokens(run),
        str(run.dtype),
    ]
    return sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _check_room(run: Run) -> None:
    needed, free = bytes_stored(run), free_bytes(run.folder.prepared)
    if needed > free:
        raise RunError(
            f"{run.folder.prepared} has {as_gigabytes(free)} free, but the teacher's predictions "
            f"need {as_gigabytes(needed)}",
            remedy="free some space, or make teacher.top smaller",
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
