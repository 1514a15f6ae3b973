"""The largest batch is tried before the first update, so that a lack of memory shows at once.

Forward, backward, the optimizer's step, validation and saving, as they will be; afterwards
everything stands as before, and the run is the same bit for bit.
"""

import shutil
from typing import Any

import torch
from torch import nn

from yrunner.distributed.collectives import wait_for_ranks
from yrunner.losses.fused_head import measure_targets
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.checkpointing import shared_folder
from yrunner.training.rng_snapshot import Snapshot

WORTH_IT = 500
"""Updates from which on a run without a GPU is rehearsed too: then it costs next to nothing."""


def is_worth_it(trainer: Any) -> bool:
    """Whether to rehearse; DeepSpeed's optimizer cannot be stepped without being moved."""
    is_long = trainer.plan.num_updates - trainer.state.global_step >= WORTH_IT
    return not trainer.is_deepspeed_enabled and (torch.cuda.is_available() or is_long)


def rehearse(trainer: Any, model: nn.Module) -> None:
    """Try the largest update, validation and save of the run; see `is_worth_it`.

    `model` is what accelerate has prepared. Raises what the machine raises when memory is short.
    """
    trainer.before_update = Snapshot(trainer.sums)
    try:
        _try_an_update(trainer, model)
        _try_a_validation(trainer, model)
        if trainer.args.world_size == 1:
            # Several processes would meet in one folder; what they save they hold already.
            _try_a_save(trainer)
    finally:
        trainer.abort_update()


def _try_an_update(trainer: Any, model: nn.Module) -> None:
    rows = trainer.plan.largest_micro_batch()
    inputs = trainer.data_collator(trainer.train_dataset.__getitems__(rows))
    num_targets = (inputs["labels"] != IGNORE_INDEX).sum().to(trainer.args.device)
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    trainer.training_step(model, inputs, num_targets)
    wrapped: Any = trainer.optimizer
    _step_without_moving(getattr(wrapped, "optimizer", wrapped))
    model.zero_grad()


def _step_without_moving(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer take the memory that it needs, and forget what it has learned.

    A resumed one has its memory already, and would lose what it knows.
    """
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            if parameter.grad is not None:
                # A gradient of 0 at a rate of 0 adds -0.0, which leaves every bit as it is.
                parameter.grad.zero_()
    optimizer.step()
    optimizer.state.clear()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _try_a_validation(trainer: Any, model: nn.Module) -> None:
    if trainer.eval_dataset is None:
        return
    batches: list[Any] = trainer.validation_batches(trainer.eval_dataset)
    examples = [trainer.eval_dataset.__getitems__(rows) for rows in batches]
    largest = max(examples, key=lambda batch: sum(len(each.input_ids) for each in batch))
    model.eval()
    with torch.no_grad():
        inputs = trainer._prepare_inputs(trainer.data_collator(largest))
        measure_targets(trainer.model, inputs)
    model.train()


def _try_a_save(trainer: Any) -> None:
    place = trainer.run_dir.checkpoints / ".rehearsal"
    with shared_folder(place) as folder:
        trainer.write_state(folder)
        wait_for_ranks()
    if trainer.args.should_save:
        shutil.rmtree(place)
