"""A student, its teacher in memory or on disk, and a trainer for them in one call."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.conftest import LOSSES
from yrunner.assembly.distillation.writing import AnswerWriter
from yrunner.data.batching.collate import BatchLayout, one_per_row
from yrunner.data.batching.plan import make_plan
from yrunner.data.batching.taught import TaughtBatches
from yrunner.losses.distillation import TeacherDivergence
from yrunner.losses.fused_head import attach
from yrunner.models.scratch import build_model
from yrunner.recipe.schema.recipe import TrainSection
from yrunner.scoring.stored_predictions import StoredPredictions, store_predictions
from yrunner.storage.run_dir import RunDir
from yrunner.training.arguments import make_arguments, token_weight
from yrunner.training.callbacks import Cadence
from yrunner.training.distillation.objective import TaughtObjective
from yrunner.training.distillation.teacher import LiveTeacher, StoredTeacher
from yrunner.training.loop import Trainer
from yrunner.training.memory.oom_probe import rehearse
from yrunner.training.metrics import MetricsFile
from yrunner.training.spike_guard import SpikeGuard

WIDER = {
    "model_type": "qwen3",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


@pytest.fixture
def teacher(capitals_tokenizer: Any) -> Any:
    """A model that is wider and deeper than the student, with a head of its own."""
    model: Any = build_model(WIDER, capitals_tokenizer, seed=7)
    # Sure of something, or it would teach nothing.
    model.lm_head.weight.data.mul_(20)
    attach(model.eval())
    return model


@pytest.fixture
def stored(teacher: Any, capitals_tokenizer: Any, tmp_path: Path) -> Callable[..., StoredTeacher]:
    """What the teacher predicts for rows, on disk."""

    def make(rows: list[Any], top: int, **options: Any) -> StoredTeacher:
        folder = tmp_path / f"predictions-{top}"
        folder.mkdir(exist_ok=True)
        pad = capitals_tokenizer.pad_token_id
        settings = {"pad_token_id": pad, "max_tokens": 500, "advance": lambda _: None}
        store_predictions(folder, teacher, rows, top=top, **settings, **options)
        counts = np.array([len(row.target_positions) for row in rows])
        return StoredTeacher(StoredPredictions.open(folder, counts))

    return make


@pytest.fixture
def make_trainer(tmp_path: Path, capitals_tokenizer: Any, teacher: Any) -> Callable[..., Trainer]:
    def make(
        model: Any,
        train: list[Any],
        validation: list[Any] | None = None,
        *,
        divergence: TeacherDivergence | None = None,
        known: StoredTeacher | None = None,
        loss: str = "plain",
        share: float = 0.5,
        weigh_teacher: bool = False,
        on_policy: float = 0.0,
        folder: str = "run",
        seed: int = 0,
        pack_to: int | None = None,
        layout: BatchLayout = one_per_row,
        rank: tuple[int, int] = (0, 1),
        **keys: Any,
    ) -> Trainer:
        """`known`: the teacher's predictions; by default it runs beside the student."""
        keys = {"lr_scheduler": "constant", "warmup_ratio": 0.0, "log_every": 1} | keys
        settings = TrainSection(**{"epochs": 1, **keys})
        run_dir = RunDir(tmp_path / folder)
        run_dir.folder.mkdir(exist_ok=True)
        plan = make_plan(
            [len(example.target_positions) for example in train],
            token_batch=settings.token_batch,
            batch_size=settings.batch_size,
            accumulation=settings.gradient_accumulation_steps,
            epochs=settings.num_epochs,
            max_updates=settings.max_steps,
            order=settings.order,
            seed=seed,
            lengths=[len(example.input_ids) for example in train],
            pack_to=pack_to,
        )
        pad = capitals_tokenizer.pad_token_id
        batches = TaughtBatches(plan, train, validation or [], pad, *rank)
        batches.layout = layout
        writer = AnswerWriter(
            batches,
            capitals_tokenizer,
            share=on_policy,
            seed=seed,
            max_new_tokens=12,
            max_length=512,
            autocast=nullcontext,
        )
        weight, loss_deadline = token_weight(LOSSES[loss])
        objective = TaughtObjective(
            weight,
            loss_deadline=loss_deadline,
            normalize=LOSSES[loss].normalize,
            guard=SpikeGuard(settings.spikes),
            teacher=known or LiveTeacher(teacher),
            divergence=divergence or TeacherDivergence(),
            teacher_share=share,
            weigh_teacher=weigh_teacher,
            writer=writer if on_policy else None,
        )
        trainer = Trainer(
            model,
            make_arguments(
                settings,
                folder=run_dir.checkpoints,
                name="test",
                num_updates=plan.num_updates,
                seed=seed,
                dtype=torch.float32,
            ),
            batches,
            objective,
            replace(Cadence.of(settings, plan), loads_best=False),
            run_dir,
            callbacks=[MetricsFile(run_dir.metrics)],
        )
        trainer.before_training.append(lambda: rehearse(trainer))
        return trainer

    return make
