"""Try the largest batch before the first update, so that running out of memory shows at once.

Forward, backward, optimizer step, validation and save as in the run. Afterwards everything is
restored: the run is the same bit for bit.
"""

import shutil
from typing import Any

import torch

from yrunner.scoring.base_predictions import to_device
from yrunner.training.checkpointing import shared_folder
from yrunner.training.rng_snapshot import Snapshot

WORTH_IT = 500
"""Updates from which a run without a GPU is probed too: then the cost is negligible."""


def rehearse(trainer: Any) -> None:
    """Try the largest update, validation and save of a run that is about to begin.

    Skipped for a short run on a CPU, and under DeepSpeed, whose optimizer cannot step without
    changing weights. Raises what torch raises when memory runs out.
    """
    is_long = trainer.plan.num_updates - trainer.state.global_step >= WORTH_IT
    if trainer.zero is not None or not (torch.cuda.is_available() or is_long):
        return
    before = Snapshot(trainer.objective.sums.values())
    try:
        _try_an_update(trainer)
        _try_a_validation(trainer)
        if trainer.accelerator.num_processes == 1:
            # Several ranks would share one folder, and what they save is in memory already.
            _try_a_save(trainer)
    finally:
        before.restore()


def _try_an_update(trainer: Any) -> None:
    rows = trainer.plan.largest_micro_batch()
    batch = trainer.batches.collate(trainer.batches.train.__getitems__(rows))
    trainer.called.train()
    trainer.objective.begin_update(trainer.model, [batch], trainer.device)
    trainer.learn(batch, 0, is_last=True)
    _step_without_moving(getattr(trainer.optimizer, "optimizer", trainer.optimizer))
    trainer.called.zero_grad()


def _step_without_moving(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer allocate its state, and clear it again.

    A resumed optimizer has its state already and must keep it.
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


def _try_a_validation(trainer: Any) -> None:
    largest = trainer.batches.largest_validation()
    if largest is not None:
        trainer.objective.validate(trainer.model, [to_device(largest, trainer.device)])


def _try_a_save(trainer: Any) -> None:
    place = trainer.run_dir.checkpoints / ".rehearsal"
    with shared_folder(place) as folder:
        trainer.checkpointer.write(folder)
    shutil.rmtree(place)
