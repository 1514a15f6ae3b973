"""Prompts, a reward of letters, and a trainer that learns from it, in one call."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from yrunner.assembly.rl.rollouts import RolloutsFile, write_answers
from yrunner.data.batching.collate import BatchLayout, one_per_row
from yrunner.data.batching.replay_rows import make_keep_plan
from yrunner.data.batching.rollouts import make_rollout_plan
from yrunner.data.conversation import Message
from yrunner.data.dataset.prompts import PromptRow
from yrunner.errors import Origin
from yrunner.losses.score_head import add_critic
from yrunner.recipe.schema.recipe import TrainSection
from yrunner.recipe.schema.rl import GrpoLoss, PpoLoss, RlooLoss, RolloutSection
from yrunner.storage.run_dir import RunDir
from yrunner.training.arguments import make_arguments
from yrunner.training.callbacks import Cadence
from yrunner.training.loop import Trainer
from yrunner.training.memory.oom_probe import rehearse
from yrunner.training.metrics import MetricsFile
from yrunner.training.replay_loss import HeldRows
from yrunner.training.rl.batches import RolloutBatches
from yrunner.training.rl.collect import Collector, WrittenAnswer
from yrunner.training.rl.objective import PolicyObjective
from yrunner.training.rl.token_samples import TokenSamples

LOSSES = {
    "grpo": GrpoLoss(kind="grpo"),
    "dr_grpo": GrpoLoss(kind="grpo", preset="dr_grpo"),
    "dapo": GrpoLoss(kind="grpo", preset="dapo"),
    "gspo": GrpoLoss(kind="grpo", preset="gspo", beta=0.1),
    "rloo": RlooLoss(kind="rloo"),
    "ppo": PpoLoss(kind="ppo"),
}


@pytest.fixture(scope="session")
def prompts(examples: list[Any]) -> list[PromptRow]:
    """Eight prompts of uneven lengths."""
    found = []
    for row, example in enumerate(examples[:8], start=1):
        ids = example.input_ids[: example.target_positions[0]]
        message = Message("user", f"question {row}")
        found.append(PromptRow(ids, (message,), {"answer": "a"}, Origin(Path("asked.jsonl"), row)))
    return found


def score_by_ids(
    rows: list[PromptRow], answers: list[WrittenAnswer], *, modulus: int = 3
) -> tuple[list[list[float | None]], list[float | None]]:
    """Two rewards: the share of even ids, and one that has no opinion on some answers."""
    parts: list[list[float | None]] = []
    for answer in answers:
        even = float(np.mean([token % 2 == 0 for token in answer.ids]))
        other = None if sum(answer.ids) % modulus == 0 else float(answer.ids[0] < 100)
        parts.append([even, other])
    return parts, [even + (other or 0.0) for even, other in parts]


@pytest.fixture
def make_trainer(tmp_path: Any, capitals_tokenizer: Any) -> Callable[..., Trainer]:
    def make(
        model: Any,
        train: list[PromptRow],
        validation: list[PromptRow] | None = None,
        *,
        loss: str = "grpo",
        rollout: dict[str, Any] | None = None,
        score: Any = score_by_ids,
        folder: str = "run",
        seed: int = 0,
        layout: BatchLayout = one_per_row,
        reference: Any = None,
        dtype: torch.dtype = torch.float32,
        kept_rows: list[Any] | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        **keys: Any,
    ) -> Trainer:
        """`keys` are keys of the recipe's `train`; `kept_rows` take a third of each update."""
        keys = {"lr_scheduler": "constant", "warmup_ratio": 0.0, "log_every": 1} | keys
        settings = TrainSection(**{"epochs": 1, "stage": "rl", **keys})
        section = RolloutSection(
            **{"generations": 4, "max_new_tokens": 6, "truncated": "keep", **(rollout or {})}
        )
        run_dir = RunDir(tmp_path / folder)
        run_dir.folder.mkdir(exist_ok=True)
        plan = make_rollout_plan(
            [len(prompt.input_ids) for prompt in train],
            generations=section.generations,
            max_new_tokens=section.max_new_tokens,
            passes=section.updates_per_rollout,
            kept_share=1 / 3 if kept_rows else 0.0,
            micro_batch_size=settings.batch_size,
            num_micro_batches=settings.gradient_accumulation_steps * num_ranks,
            epochs=settings.num_epochs,
            max_updates=settings.max_steps,
            order=settings.order,
            seed=seed,
        )
        if LOSSES[loss].kind == "ppo":
            torch.manual_seed(6)
            add_critic(model)
        pad = capitals_tokenizer.pad_token_id
        batches = RolloutBatches(
            plan,
            train,
            validation or [],
            pad,
            rank,
            num_ranks,
            loss=LOSSES[loss],
            rollout=section,
        )
        trainer = Trainer(
            model,
            make_arguments(
                settings,
                folder=run_dir.checkpoints,
                name="test",
                num_updates=plan.num_updates,
                seed=seed,
                dtype=dtype,
            ),
            batches,
            PolicyObjective(
                LOSSES[loss],
                settings.spikes,
                batches.buffer,
                ["even", "low"],
                generations=section.generations,
                temperature=section.temperature,
                resamples=section.resample > 0,
            ),
            replace(Cadence.of(settings, plan), loads_best=False),
            run_dir,
            callbacks=[MetricsFile(run_dir.metrics)],
        )
        batches.collector = Collector(
            trainer.model,
            train,
            partial(
                write_answers,
                trainer.model,
                capitals_tokenizer,
                section,
                is_over=lambda: trainer.stop.cuts_off,
            ),
            score,
            LOSSES[loss],
            section,
            seed,
            pad,
            max_tokens=64,
            reference=reference,
        )
        file = RolloutsFile(run_dir.rollouts, ["even", "low"], batches.buffer, section)
        trainer.callbacks.append(file)
        samples = TokenSamples(run_dir.rollout_tokens, batches.train)
        trainer.callbacks.append(samples)
        trainer.objective.samples = samples
        batches.watchers.append(file.note)
        trainer.batches.layout = layout
        if kept_rows:
            trainer.objective.regulariser = HeldRows(
                kept_rows,
                make_keep_plan(
                    [len(row.target_positions) for row in kept_rows],
                    [len(row.input_ids) for row in kept_rows],
                    per_update=plan.kept,
                    seed=0,
                ),
                lanes=plan.lanes,
                strength=2.0,
                by_text=False,
                tops=None,
                pad_token_id=pad,
                layout=layout,
            )
        trainer.before_training.append(lambda: rehearse(trainer))
        return trainer

    return make
