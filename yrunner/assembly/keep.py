"""What a run compares its model with: regulariser, drift measure, and reference of preferences."""

from hashlib import sha256
from itertools import chain
from typing import Any, assert_never

import torch
from filelock import FileLock

from yrunner.assembly.replay import RegulariserData, rows_key
from yrunner.assembly.run import Run
from yrunner.assembly.trainer import (
    compared_rows,
    has_base_beneath,
    untrained_model,
)
from yrunner.console import progress, say
from yrunner.data.batching.replay_rows import make_keep_plan
from yrunner.data.dataset.cache import Cache
from yrunner.data.dataset.row_report import num_rows
from yrunner.errors import RunError
from yrunner.models.model_key import model_key
from yrunner.recipe.schema.keep import Ewc, KeepRows, NoKeep, SelfReplay
from yrunner.scoring.score_file import row_hashes
from yrunner.storage.run_dir import read_json, write_json
from yrunner.training.drift import DriftGauge
from yrunner.training.ewc import EwcPenalty, estimate_fisher, load_fisher, save_fisher
from yrunner.training.loop import Trainer
from yrunner.training.preference.answers import compares_with_reference
from yrunner.training.preference.reference import FILE, Reference, measure_reference
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
    path = data.folder.fisher(rows_key(run, data.rows, tuning, recipe.seed, recipe.model.dtype))
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
                _score_answers(run).save(partial)
                entry = cache.complete(key, partial, {})
        else:
            say(f"reference: {num_rows(len(run.dataset.train))}, scored before")
        return Reference.load(entry)


def _score_answers(run: Run) -> Reference:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = untrained_model(run).to(device)
    parts = compared_rows(run)
    autocast = torch.autocast(device, dtype=run.dtype, enabled=run.dtype != torch.float32)
    with autocast, progress("answers under the reference, rows", sum(map(len, parts))) as advance:
        found = [
            measure_reference(
                model,
                part,
                pad_token_id=run.tokenizer.pad_token_id,
                max_tokens=run.max_tokens,
                advance=advance,
            )
            for part in parts
        ]
    return Reference(*found)
