"""One small training in one process or in several, every way of sharing memory out."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.processes import forget_sharing, run_together
from benchmarks.ranks_cases import (
    LEARNED,
    LOSSES,
    MICRO_BATCHES,
    PAD,
    ROWS,
    SETTINGS,
    SHARINGS,
    TOPS,
    TUNINGS,
    VALIDATED,
    WATCHED,
    Case,
    Found,
)
from benchmarks.ranks_keep import FIGURES, KEPT_SHARE, hold
from yrunner.data.batching.collate import one_per_row
from yrunner.data.batching.plan import make_plan
from yrunner.distributed.collectives import join_ranks, num_ranks, this_rank
from yrunner.models.errors import quiet_libraries
from yrunner.models.load import load_model
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.recipe import TrainSection
from yrunner.scoring.base_predictions import KeptTops
from yrunner.storage.run_dir import RunDir
from yrunner.training.arguments import make_arguments, token_weight
from yrunner.training.callbacks import Cadence
from yrunner.training.deepspeed.config import complete, deepspeed_settings
from yrunner.training.drift import DriftGauge
from yrunner.training.metrics import MetricsFile, read_metrics
from yrunner.training.trainer import SignalTrainer

NUM_PROCESSES = 2


def make_trainer(case: Case, folder: Path, *, max_steps: int | None = None) -> SignalTrainer:
    """The trainer of a case in this process, whose base lies in `folder`."""
    rows = dict(ROWS[case.rows])
    layout, pack_to = rows.pop("layout", one_per_row), rows.pop("pack_to", None)
    train = TrainSection(**(SETTINGS | rows), max_steps=max_steps)
    plan = make_plan(
        [len(example.target_positions) for example in LEARNED],
        token_batch=train.token_batch,
        batch_size=train.batch_size,
        accumulation=MICRO_BATCHES,
        epochs=train.num_epochs,
        max_updates=train.max_steps,
        order=train.order,
        seed=0,
        lengths=[len(example.input_ids) for example in LEARNED],
        pack_to=pack_to,
        kept_share=KEPT_SHARE[case.keep],
    )
    run_dir = RunDir(folder / case.name)
    dtype = getattr(torch, case.dtype)
    section = SHARINGS.get(case.sharing)
    arguments = make_arguments(
        train,
        folder=run_dir.checkpoints,
        name=case.name,
        num_updates=plan.num_updates,
        seed=0,
        dtype=dtype,
        validates=True,
        micro_steps=MICRO_BATCHES // num_ranks(),
        deepspeed=None if section is None else complete(deepspeed_settings(section)),
    )
    run_dir.folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    base = load_model(str(folder / "base"), dtype=dtype)
    weight, loss_deadline = token_weight(LOSSES[case.loss])
    cadence = Cadence(
        epoch_ends=plan.epoch_ends,
        log_every=train.log_every,
        checkpoint_every=train.checkpoint.every,
        validates=True,
    )
    trainer = SignalTrainer(
        model=apply_tuning(base, TUNINGS[case.tuning]),
        args=arguments,
        callbacks=[cadence, MetricsFile(run_dir.metrics)],
        train_examples=LEARNED,
        validation_examples=VALIDATED,
        plan=plan,
        token_batch=train.token_batch,
        weight=weight,
        loss_deadline=loss_deadline,
        normalize=LOSSES[case.loss].normalize,
        pad_token_id=PAD,
        run_dir=run_dir,
        keep_checkpoints=train.checkpoint.keep,
        spikes=train.spikes,
    )
    trainer.use_layout(layout)
    # An adapter can be switched off; what another base predicted has to be kept.
    tops = None if case.tuning == "lora" else KeptTops.load(folder / "base" / TOPS)
    trainer.gauge = DriftGauge(WATCHED, tops, PAD, max_tokens=200)
    hold(trainer, case, folder / "base", pack_to)
    # The last weights are compared, not the best.
    trainer.args.load_best_model_at_end = False
    return trainer


def train_case(case: Case, folder: Path, *, resume_at: int | None = None) -> Found:
    """Train, or go on after the checkpoint of an update; every process gets the losses."""
    trainer = make_trainer(case, folder)
    checkpoint = None if resume_at is None else str(trainer.run_dir.checkpoint(resume_at))
    with quiet_libraries():
        trainer.train(resume_from_checkpoint=checkpoint)
    weights = trainer.model.state_dict()
    if trainer.zero is not None:
        weights = trainer.zero.whole_weights()
    records = read_metrics(trainer.run_dir.metrics) if this_rank() == 0 else []
    keys = ("loss", "weighted_loss", "eval_loss")
    losses = [record[key] for record in records for key in keys if key in record]
    weights = {name: value for name, value in weights.items() if name != "lm_head.weight"}
    return Found(
        losses,
        {name: value.detach().clone() for name, value in weights.items()},
        [record["eval_drift"] for record in records if "eval_drift" in record],
        [record[key] for record in records for key in FIGURES if key in record],
    )


def start_processes(
    cases: Sequence[Case],
    folder: Path,
    *,
    number: int = NUM_PROCESSES,
    resume_at: int | None = None,
    tell: Callable[[Case, Path], None] | None = None,
) -> None:
    """Train the cases in new processes, one case after the other; see `found_together`.

    `resume_at`: go on after the checkpoint of this update, which is there. `tell`: called by the
    first process with each case that is done, and the folder.
    """
    run_together(_work, cases, folder, resume_at, tell, number=number)


def found_together(case: Case, folder: Path) -> Found:
    """What the processes came to."""
    return Found(**torch.load(case.result(folder)))


def save_found(found: Found, case: Case, folder: Path) -> None:
    """Keep it there."""
    torch.save(asdict(found), case.result(folder))


def _work(
    rank: int,
    cases: Sequence[Case],
    folder: Path,
    resume_at: int | None,
    tell: Callable[[Case, Path], None] | None,
) -> None:
    for case in cases:
        found = train_together(case, folder, resume_at=resume_at)
        if rank == 0:
            save_found(found, case, folder)
            if tell is not None:
                tell(case, folder)


def train_together(case: Case, folder: Path, *, resume_at: int | None = None) -> Found:
    """`train_case` in one of several processes, which may have trained another case before."""
    forget_sharing()
    join_ranks(deepspeed=SHARINGS[case.sharing] is not None)
    return train_case(case, folder, resume_at=resume_at)
