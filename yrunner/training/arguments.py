"""What the recipe says, in the words of transformers."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, assert_never

import torch
from transformers import TrainingArguments, get_scheduler

from yrunner.distributed.collectives import is_joined
from yrunner.losses.nlirg import HARD_UP_TO, nlirg_weight
from yrunner.losses.targets import PLAIN, TokenWeight
from yrunner.losses.token_weights import EAFT_TOP, dft_weight, eaft_weight, nlirg_entropy_weight
from yrunner.recipe.schema.recipe import (
    DftLoss,
    EaftLoss,
    Loss,
    NlirgEntropyLoss,
    NlirgLoss,
    PlainLoss,
    TrainSection,
)

NEVER = 10**9
"""A number of updates that no run reaches: cadence.py says when to save and to validate."""


def make_arguments(
    train: TrainSection,
    *,
    folder: Path,
    name: str,
    num_updates: int,
    seed: int,
    dtype: torch.dtype,
    validates: bool,
    micro_steps: int | None = None,
    deepspeed: Mapping[str, Any] | None = None,
) -> TrainingArguments:
    """Arguments of a run of `num_updates` that leaves its checkpoints in `folder`.

    `micro_steps`: those of an update in each process, if they are not the recipe's. `deepspeed`:
    its configuration; see `join_ranks`, which comes before.
    """
    strategy = "steps" if validates else "no"
    arguments = TrainingArguments(
        output_dir=str(folder),
        run_name=name,
        max_steps=num_updates,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=micro_steps or train.gradient_accumulation_steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler,
        warmup_steps=count_warmup(train, num_updates),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optimizer,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=train.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        seed=seed,
        eval_strategy=strategy,
        eval_steps=NEVER,
        save_strategy="steps",
        save_steps=NEVER,
        load_best_model_at_end=validates,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        # trackers.py adds TensorBoard itself.
        report_to=[tracker for tracker in train.trackers if tracker != "tensorboard"],
        disable_tqdm=True,
        remove_unused_columns=False,
        deepspeed=None if deepspeed is None else dict(deepspeed),
        # Every trained weight gets a gradient from every micro-batch, the empty ones too; looking
        # for others, and copying what never changes, would only cost time.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        # Where the processes have met already Trainer must not let them meet once more.
        accelerator_config={"use_configured_state": is_joined()},
        # Trainer would put the average of the earlier losses in place of one that is not a number.
        logging_nan_inf_filter=False,
    )
    # With several GPUs in one process Trainer would fall back to DataParallel, which splits the
    # batch behind our back.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def learning_rates(train: TrainSection, num_updates: int, at: Sequence[int]) -> list[float]:
    """The learning rate of some updates of a run, counted from 0, as Trainer sets it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=train.learning_rate)
    scheduler = get_scheduler(
        train.lr_scheduler,
        optimizer,
        num_warmup_steps=count_warmup(train, num_updates),
        num_training_steps=num_updates,
    )
    return [train.learning_rate * scheduler.lr_lambdas[0](update) for update in at]


def count_warmup(train: TrainSection, num_updates: int) -> int:
    """Updates over which the learning rate rises to its peak."""
    return math.ceil(train.warmup_ratio * num_updates)


def token_weight(loss: Loss) -> tuple[TokenWeight, float]:
    """The weight of a target, and the loss from which on the zone of the refused begins."""
    numbers = loss.model_dump(exclude={"kind", "normalize"})
    match loss:
        case PlainLoss():
            return PLAIN, HARD_UP_TO
        case NlirgLoss():
            nlirg = TokenWeight(lambda loss_N, _: nlirg_weight(loss_N, **numbers))
            return nlirg, loss.loss_deadline
        case NlirgEntropyLoss():
            return TokenWeight(partial(nlirg_entropy_weight, **numbers)), loss.loss_deadline
        case DftLoss():
            return TokenWeight(lambda loss_N, _: dft_weight(loss_N)), HARD_UP_TO
        case EaftLoss():
            return TokenWeight(partial(eaft_weight, **numbers), top=EAFT_TOP), HARD_UP_TO
        case _:
            assert_never(loss)
