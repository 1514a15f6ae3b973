"""What holds a run to its base, and the gauge of it, made of the recipe and of its kept rows."""

from hashlib import sha256
from typing import Any, assert_never

from filelock import FileLock

from yrunner.assembly.replay import KeptData, rows_key
from yrunner.assembly.run import Run
from yrunner.console import progress
from yrunner.data.batching.replay_rows import make_keep_plan
from yrunner.errors import RunError
from yrunner.recipe.schema.keep import Ewc, KeepRows, NoKeep, SelfReplay
from yrunner.scoring.score_file import row_hashes
from yrunner.storage.run_dir import read_json, write_json
from yrunner.training.drift import DriftGauge
from yrunner.training.ewc import EwcPenalty, estimate_fisher, load_fisher, save_fisher
from yrunner.training.loop import Trainer
from yrunner.training.replay_loss import HeldRows, Regulariser


def add_regulariser(trainer: Trainer, run: Run, kept: KeptData) -> None:
    """Let the recipe's `keep` add to the loss of a trainer whose model is as the run starts.

    And let it measure how far it moves from its base, where that wrote rows for it.
    """
    trainer.objective.regulariser = _make_regulariser(trainer, run, kept)
    if kept.held_out:
        trainer.objective.gauge = DriftGauge(
            kept.held_out,
            kept.held_out_tops,
            trainer.batches.pad_token_id,
            max_tokens=run.max_tokens,
        )


def record_kept(run: Run, kept: KeptData) -> None:
    """Note in the run folder which rows it is held to, if any.

    Raises `RunError` for a run that is taken up with others: they may be edited by hand.
    """
    if not kept.rows:
        return
    text = "".join(row_hashes(kept.rows))
    content = {"rows": len(kept.rows), "hash": sha256(text.encode()).hexdigest()}
    run_dir, resumes = run.folder, run.options.from_step is not None
    if resumes and run_dir.keep.exists() and read_json(run_dir.keep) != content:
        raise RunError(
            f"the rows that {run_dir.folder} is held to have changed since it was begun",
            remedy="bring them back, or start anew with --overwrite",
        )
    write_json(run_dir.keep, content)


def _make_regulariser(trainer: Trainer, run: Run, kept: KeptData) -> Regulariser | None:
    recipe, keep = run.recipe, run.recipe.keep
    match keep:
        case NoKeep():
            return None
        case SelfReplay() | KeepRows():
            lengths = [len(example.input_ids) for example in kept.rows]
            keep_plan = make_keep_plan(
                [len(example.target_positions) for example in kept.rows],
                lengths,
                per_update=trainer.plan.kept,
                seed=recipe.seed,
                pack_to=recipe.data.max_length if recipe.data.packing else None,
            )
            return HeldRows(
                kept.rows,
                keep_plan,
                lanes=trainer.plan.lanes,
                strength=keep.strength,
                by_text=keep.by == "text",
                tops=kept.row_tops,
                pad_token_id=trainer.batches.pad_token_id,
                layout=trainer.batches.layout,
            )
        case Ewc():
            return _make_springs(run, keep.strength, kept, trainer.model)
        case _:
            assert_never(keep)


def _make_springs(run: Run, strength: float, kept: KeptData, model: Any) -> EwcPenalty:
    recipe = run.recipe
    assert kept.folder is not None, "rows were written or read"
    tuning = recipe.tuning.model_dump(mode="json")
    # The random half of a new adapter comes of the seed.
    path = kept.folder.fisher(rows_key(run, kept.rows, tuning, recipe.seed, recipe.model.dtype))
    kept.folder.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.folder.lock):
        if not path.exists():
            with progress("what the base depends on, rows", len(kept.rows)) as advance:
                fisher = estimate_fisher(
                    model, kept.rows, pad_token_id=run.tokenizer.pad_token_id, advance=advance
                )
            save_fisher(fisher, path)
    return EwcPenalty(model, load_fisher(path, model), strength)
