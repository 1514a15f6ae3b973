"""Pairs, rated answers, and a trainer for them in one call."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from yrunner.data.batching.answers import AnswerBatches, ComparedRows
from yrunner.data.batching.collate import BatchLayout, one_per_row
from yrunner.data.batching.plan import make_plan
from yrunner.data.conversation import RatedExample, TokenizedExample, TokenizedPair
from yrunner.recipe.schema.preference import DpoLoss, KtoLoss, OrpoLoss, SimpoLoss
from yrunner.recipe.schema.recipe import TrainSection
from yrunner.storage.run_dir import RunDir
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.arguments import make_arguments
from yrunner.training.callbacks import Cadence
from yrunner.training.loop import Trainer
from yrunner.training.memory.oom_probe import rehearse
from yrunner.training.metrics import MetricsFile
from yrunner.training.preference.objective import PreferenceObjective

LOSSES = {
    "sigmoid": DpoLoss(kind="dpo"),
    "sigmoid_sft": DpoLoss(kind="dpo", beta=0.3, sft=0.7),
    "mean": DpoLoss(kind="dpo", beta=4.0, length="mean"),
    "ipo": DpoLoss(kind="dpo", form="ipo", beta=0.2),
    "hinge": DpoLoss(kind="dpo", form="hinge", beta=0.2),
    "robust": DpoLoss(kind="dpo", form="robust", label_smoothing=0.2),
    "conservative": DpoLoss(kind="dpo", form="conservative", label_smoothing=0.2),
    "simpo": SimpoLoss(kind="simpo", sft=0.1),
    "orpo": OrpoLoss(kind="orpo", beta=0.5),
    "kto": KtoLoss(kind="kto", desirable_weight=1.5),
}


def prompt_of(example: TokenizedExample) -> list[int]:
    """What the first target follows."""
    return example.input_ids[: example.target_positions[0]]


def answered(
    prompt: list[int], example: TokenizedExample, most: int | None = None
) -> TokenizedExample:
    """This prompt, with the answer of an example; together at most this many tokens."""
    start = example.target_positions[0]
    ids = prompt + example.input_ids[start:]
    labels = [IGNORE_INDEX] * len(prompt) + example.labels[start:]
    return TokenizedExample(ids[:most], labels[:most], example.origin)


@pytest.fixture(scope="session")
def pairs(examples: list[Any]) -> list[TokenizedPair]:
    """Twenty pairs; the worse answer is that of another conversation."""
    worse = [*examples[21:], examples[20]]
    return [
        TokenizedPair(better, answered(prompt_of(better), other))
        for better, other in zip(examples[:20], worse, strict=True)
    ]


@pytest.fixture(scope="session")
def rated(pairs: list[TokenizedPair]) -> list[RatedExample]:
    """Twenty rated answers, a third of them good."""
    return [
        RatedExample(pair.chosen if number % 3 == 0 else pair.rejected, number % 3 == 0)
        for number, pair in enumerate(pairs)
    ]


def with_lora(model: Any, *, trained: bool = False, dropout: float = 0.0) -> Any:
    """The model with an adapter, which changes nothing unless it is `trained` already."""
    torch.manual_seed(5)
    config = LoraConfig(
        r=4,
        lora_dropout=dropout,
        target_modules="all-linear",
        init_lora_weights=not trained,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


@pytest.fixture
def make_trainer(tmp_path: Any, capitals_tokenizer: Any) -> Callable[..., Trainer]:
    def make(
        model: Any,
        train: list[Any],
        validation: list[Any] | None = None,
        *,
        loss: Any = "sigmoid",
        reference: list[torch.Tensor] | None = None,
        folder: str = "run",
        seed: int = 0,
        pack_to: int | None = None,
        layout: BatchLayout = one_per_row,
        shares_prompts: bool = False,
        **keys: Any,
    ) -> Trainer:
        """`reference`: log-probabilities of all answers to train and to validate on."""
        section = LOSSES.get(loss, loss)
        keys = {"lr_scheduler": "constant", "warmup_ratio": 0.0, "log_every": 1} | keys
        settings = TrainSection(**{"epochs": 1, "stage": "preference", **keys})
        run_dir = RunDir(tmp_path / folder)
        run_dir.folder.mkdir(exist_ok=True)
        rated = isinstance(section, KtoLoss)
        rows = [ComparedRows(rows or [], rated=rated) for rows in (train, validation)]
        for known, part in zip(reference or (), rows, strict=False):
            part.reference_RA = known
        answers = [
            [answer for answer in part[place, 0].own]
            for part in rows[:1]
            for place in range(len(train))
        ]
        plan = make_plan(
            [sum(len(each.target_positions) for each in row) for row in answers],
            token_batch=0,
            batch_size=settings.batch_size,
            accumulation=settings.gradient_accumulation_steps,
            epochs=settings.num_epochs,
            max_updates=settings.max_steps,
            order=settings.order,
            seed=seed,
            lengths=[sum(len(each.input_ids) for each in row) for row in answers],
            pack_to=pack_to,
        )
        arguments = make_arguments(
            settings,
            folder=run_dir.checkpoints,
            name="test",
            num_updates=plan.num_updates,
            seed=seed,
            dtype=torch.float32,
        )
        trainer = Trainer(
            model,
            arguments,
            AnswerBatches(plan, *rows, capitals_tokenizer.pad_token_id),
            PreferenceObjective(section, settings.spikes),
            replace(Cadence.of(settings, plan), loads_best=False),
            run_dir,
            callbacks=[MetricsFile(run_dir.metrics)],
        )
        trainer.batches.layout = layout
        trainer.batches.shares_prompts = shares_prompts
        trainer.batches.masked_layout = trainer.batches.layout
        trainer.before_training.append(lambda: rehearse(trainer))
        return trainer

    return make
