"""Build a Trainer in one call."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from yrunner.data.batching.batches import Batches
from yrunner.data.batching.collate import BatchLayout, one_per_row
from yrunner.data.batching.plan import make_plan
from yrunner.recipe.schema.recipe import (
    Checkpoint,
    DftLoss,
    EaftLoss,
    NlirgEntropyLoss,
    NlirgLoss,
    PlainLoss,
    TrainSection,
)
from yrunner.storage.run_dir import RunDir
from yrunner.training.arguments import make_arguments, token_weight
from yrunner.training.callbacks import Cadence
from yrunner.training.loop import Trainer
from yrunner.training.memory.oom_probe import rehearse
from yrunner.training.metrics import MetricsFile
from yrunner.training.objective import TargetObjective
from yrunner.training.spike_guard import SpikeGuard
from yrunner.training.trackers import TensorBoard, tracker_callbacks

LOSSES = {
    "plain": PlainLoss(),
    "nlirg": NlirgLoss(kind="nlirg"),
    "nlirg_by_weights": NlirgLoss(kind="nlirg", normalize="weights"),
    "nlirg_entropy": NlirgEntropyLoss(kind="nlirg_entropy"),
    "dft": DftLoss(kind="dft"),
    "eaft": EaftLoss(kind="eaft"),
}


@pytest.fixture
def make_trainer(tmp_path: Path, capitals_tokenizer: Any) -> Callable[..., Trainer]:
    def make(
        model: Any,
        train: list[Any],
        validation: list[Any] | None = None,
        *,
        loss: str = "plain",
        folder: str = "run",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        pack_to: int | None = None,
        layout: BatchLayout = one_per_row,
        kept: int = 0,
        **keys: Any,
    ) -> Trainer:
        """`keys` are keys of the recipe's `train`; a constant learning rate unless they say."""
        keys = {"lr_scheduler": "constant", "warmup_ratio": 0.0, "log_every": 1} | keys
        section = TrainSection(**{"epochs": 1, **keys})
        run_dir = RunDir(tmp_path / folder)
        run_dir.folder.mkdir(exist_ok=True)
        plan = make_plan(
            [len(example.target_positions) for example in train],
            token_batch=section.token_batch,
            batch_size=section.batch_size,
            accumulation=section.gradient_accumulation_steps,
            epochs=section.num_epochs,
            max_updates=section.max_steps,
            order=section.order,
            seed=seed,
            lengths=[len(example.input_ids) for example in train],
            pack_to=pack_to,
            kept_share=kept / (section.batch_size * section.gradient_accumulation_steps),
        )
        weight, loss_deadline = token_weight(LOSSES[loss])
        trackers = tracker_callbacks(section.trackers, run_dir.trackers, weight)
        histograms = [it.histograms for it in trackers if isinstance(it, TensorBoard)]
        trainer = Trainer(
            model,
            make_arguments(
                section,
                folder=run_dir.checkpoints,
                name="test",
                num_updates=plan.num_updates,
                seed=seed,
                dtype=dtype,
            ),
            Batches(plan, train, validation or [], capitals_tokenizer.pad_token_id),
            TargetObjective(
                weight,
                loss_deadline=loss_deadline,
                normalize=LOSSES[loss].normalize,
                guard=SpikeGuard(section.spikes),
                histograms=next(iter(histograms), None),
            ),
            Cadence.of(section, plan),
            run_dir,
            torch_compile=section.torch_compile,
            callbacks=[MetricsFile(run_dir.metrics), *trackers],
        )
        trainer.batches.layout = layout
        trainer.before_training.append(lambda: rehearse(trainer))
        return trainer

    return make


def slow_losses(model: Any, example: Any, places: list[int] | None = None) -> torch.Tensor:
    """The loss of the targets at `places`, by default of all: no padding, all logits, a look-up."""
    places = example.target_positions if places is None else places
    logits_TV = model(torch.tensor([example.input_ids])).logits[0]
    labels = [example.labels[place] for place in places]
    return -logits_TV.log_softmax(-1)[[place - 1 for place in places], labels]


def weights_of(model: Any) -> torch.Tensor:
    """All weights in one vector, in float64."""
    return torch.cat([value.detach().double().flatten() for value in model.state_dict().values()])


def relative_difference(model: Any, other: Any) -> float:
    """L2 norm of the difference over that of the weights."""
    mine, theirs = weights_of(model), weights_of(other)
    return ((mine - theirs).norm() / mine.norm()).item()


def checkpoint_every(steps: int, keep: int = 2) -> Checkpoint:
    return Checkpoint(every=steps, keep=keep)
