"""Train a case of `benchmarks.ranks` in one process or in several."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.processes import reset_distributed_state, run_together
from benchmarks.ranks.cases import (
    DRIFT_ROWS,
    LOSSES,
    MICRO_BATCHES,
    PAD,
    POLICIES,
    PREFERENCES,
    REWARD,
    ROWS,
    SETTINGS,
    SHARINGS,
    TEACHER,
    TOPS,
    TRAIN_ROWS,
    TUNINGS,
    VALIDATION_ROWS,
    VOCABULARY,
    Case,
    Result,
    compared_rows,
)
from benchmarks.ranks.regularisers import FIGURES, KEPT_SHARE, add_regulariser
from benchmarks.ranks.rewards import FIGURES as REWARDED
from benchmarks.ranks.rewards import let_it_write, rollout_plan, what_is_rewarded
from yrunner.data.batching.answers import AnswerBatches
from yrunner.data.batching.batches import Batches
from yrunner.data.batching.collate import one_per_row
from yrunner.data.batching.plan import Plan, make_plan
from yrunner.data.batching.taught import TaughtBatches
from yrunner.data.conversation import TokenizedExample
from yrunner.distributed.collectives import join_ranks, num_ranks, this_rank
from yrunner.losses.distillation import TeacherDivergence
from yrunner.losses.fused_head import attach
from yrunner.losses.score_head import add_score_head, attach_scores
from yrunner.models.errors import silence_libraries
from yrunner.models.load import load_model, without_zero3
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.recipe import TrainSection
from yrunner.scoring.base_predictions import CachedPredictions
from yrunner.scoring.stored_predictions import StoredPredictions
from yrunner.storage.run_dir import RunDir
from yrunner.training.arguments import make_arguments, token_weight
from yrunner.training.callbacks import Cadence
from yrunner.training.deepspeed.config import complete, deepspeed_settings
from yrunner.training.distillation.objective import TaughtObjective
from yrunner.training.distillation.teacher import LiveTeacher, StoredTeacher, Teacher
from yrunner.training.drift import DriftGauge
from yrunner.training.loop import Trainer
from yrunner.training.metrics import MetricsFile, read_metrics
from yrunner.training.objective import Objective, TargetObjective
from yrunner.training.preference.objective import PreferenceObjective
from yrunner.training.preference.reference import Reference
from yrunner.training.preference.reward import RewardObjective
from yrunner.training.spike_guard import SpikeGuard

NUM_PROCESSES = 2
TAUGHT = ("teacher_divergence", "eval_teacher_divergence")


def make_trainer(case: Case, folder: Path, *, max_steps: int | None = None) -> Trainer:
    """Make the trainer of a case in this process; `folder` holds the base."""
    rows = dict(ROWS[case.rows])
    layout, pack_to = rows.pop("layout", one_per_row), rows.pop("pack_to", None)
    train = TrainSection(**(SETTINGS | rows), max_steps=max_steps)
    plan = rollout_plan(case, train) if case.loss in POLICIES else _plan(case, train, pack_to)
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
        micro_steps=MICRO_BATCHES // num_ranks(),
        deepspeed=None if section is None else complete(deepspeed_settings(section)),
    )
    run_dir.folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    base = load_model(str(folder / "base"), dtype=dtype)
    if case.loss in REWARD:
        add_score_head(base)
        attach_scores(base)
    trainer = Trainer(
        apply_tuning(base, TUNINGS[case.tuning]),
        arguments,
        *_what_is_learned(case, folder / "base", train, plan),
        Cadence.of(train, plan),
        run_dir,
        callbacks=[MetricsFile(run_dir.metrics)],
    )
    trainer.batches.layout = layout
    if case.loss in POLICIES:
        let_it_write(trainer, case, folder / "base")
    # An adapter can be disabled to get the base; otherwise its predictions are stored.
    tops = None if case.tuning == "lora" else CachedPredictions.load(folder / "base" / TOPS)
    trainer.objective.gauge = DriftGauge(DRIFT_ROWS, tops, PAD, max_tokens=200)
    add_regulariser(trainer, case, folder / "base", pack_to)
    # Compare the last weights, not the best.
    trainer.cadence = replace(trainer.cadence, loads_best=False)
    return trainer


def _plan(case: Case, train: TrainSection, pack_to: int | None) -> Plan:
    """Which rows each update of a case learns from."""
    answers: list[Sequence[TokenizedExample]] = [[example] for example in TRAIN_ROWS]
    if case.loss in (*PREFERENCES, *REWARD):
        compared, _ = compared_rows(case.loss)
        answers = [compared[number, 0].own for number in range(len(compared))]
        pack_to = pack_to and len(answers[0]) * pack_to
    return make_plan(
        [sum(len(each.target_positions) for each in row) for row in answers],
        token_batch=train.token_batch,
        batch_size=train.batch_size,
        accumulation=MICRO_BATCHES,
        epochs=train.num_epochs,
        max_updates=train.max_steps,
        order=train.order,
        seed=0,
        lengths=[sum(len(each.input_ids) for each in row) for row in answers],
        pack_to=pack_to,
        kept_share=KEPT_SHARE[case.keep],
    )


def _what_is_learned(
    case: Case, base: Path, train: TrainSection, plan: Plan
) -> tuple[Batches, Objective]:
    """The rows and the loss of a case."""
    if case.loss in POLICIES:
        return what_is_rewarded(case, train, plan)
    if case.loss in PREFERENCES:
        rows = compared_rows(case.loss)
        if case.tuning != "lora":
            known = Reference.load(base / case.loss)
            rows[0].reference_RA, rows[1].reference_RA = known.train_RA, known.validation_RA
        batches = AnswerBatches(plan, *rows, PAD, this_rank(), num_ranks())
        return batches, PreferenceObjective(PREFERENCES[case.loss], train.spikes)
    if case.loss in REWARD:
        batches = AnswerBatches(plan, *compared_rows(case.loss), PAD, this_rank(), num_ranks())
        return batches, RewardObjective(REWARD[case.loss], train.spikes)
    weight, loss_deadline = token_weight(LOSSES[case.loss])
    options: dict[str, Any] = {
        "loss_deadline": loss_deadline,
        "normalize": LOSSES[case.loss].normalize,
        "guard": SpikeGuard(train.spikes),
    }
    rows = (plan, TRAIN_ROWS, VALIDATION_ROWS, PAD, this_rank(), num_ranks())
    if case.teacher == "none":
        return Batches(*rows), TargetObjective(weight, **options)
    options |= {
        "teacher": _teacher(case, base / TEACHER),
        "divergence": TeacherDivergence("jsd", beta=0.3, temperature=1.5, num_tokens=VOCABULARY),
        "teacher_share": 0.6,
        "weigh_teacher": LOSSES[case.loss].normalize == "weights",
    }
    return TaughtBatches(*rows), TaughtObjective(weight, **options)


def _teacher(case: Case, folder: Path) -> Teacher:
    if case.teacher == "live":
        with without_zero3():
            model: Any = load_model(str(folder), dtype=getattr(torch, case.dtype))
        attach(model)
        return LiveTeacher(model.requires_grad_(False))
    counts = [len(example.target_positions) for example in (*TRAIN_ROWS, *VALIDATION_ROWS)]
    return StoredTeacher(StoredPredictions.open(folder, np.array(counts)))


def train_case(case: Case, folder: Path, *, resume_at: int | None = None) -> Result:
    """Train, or resume from the checkpoint of an update; rank 0 gets the logged figures."""
    trainer = make_trainer(case, folder)
    checkpoint = None if resume_at is None else trainer.run_dir.checkpoint(resume_at)
    with silence_libraries():
        trainer.train(checkpoint)
    weights = trainer.model.state_dict()
    if trainer.zero is not None:
        weights = trainer.zero.whole_weights()
    records = read_metrics(trainer.run_dir.metrics) if this_rank() == 0 else []
    keys = ("loss", "weighted_loss", "eval_loss")
    if case.loss in POLICIES:
        keys = REWARDED
    losses = [record[key] for record in records for key in keys if key in record]
    weights = {name: value for name, value in weights.items() if name != "lm_head.weight"}
    return Result(
        losses,
        {name: value.detach().clone() for name, value in weights.items()},
        [record["eval_drift"] for record in records if "eval_drift" in record],
        [record[key] for record in records for key in FIGURES if key in record],
        [record[key] for record in records for key in TAUGHT if key in record],
    )


def start_processes(
    cases: Sequence[Case],
    folder: Path,
    *,
    number: int = NUM_PROCESSES,
    resume_at: int | None = None,
    report: Callable[[Case, Path], None] | None = None,
) -> None:
    """Train the cases in new processes, one case after the other; see `load_result`.

    `resume_at`: resume from the checkpoint of this update. `report`: called by rank 0 with each
    finished case and the folder.
    """
    run_together(_train_cases, cases, folder, resume_at, report, number=number)


def load_result(case: Case, folder: Path) -> Result:
    """Load the saved result of a case."""
    return Result(**torch.load(case.result_file(folder)))


def save_result(result: Result, case: Case, folder: Path) -> None:
    """Save the result of a case."""
    torch.save(asdict(result), case.result_file(folder))


def _train_cases(
    rank: int,
    cases: Sequence[Case],
    folder: Path,
    resume_at: int | None,
    report: Callable[[Case, Path], None] | None,
) -> None:
    for case in cases:
        result = train_together(case, folder, resume_at=resume_at)
        if rank == 0:
            save_result(result, case, folder)
            if report is not None:
                report(case, folder)


def train_together(case: Case, folder: Path, *, resume_at: int | None = None) -> Result:
    """Run `train_case` as one of several ranks, which may have trained another case before."""
    reset_distributed_state()
    join_ranks(deepspeed=SHARINGS[case.sharing] is not None)
    return train_case(case, folder, resume_at=resume_at)
