"""The model that a recipe trains, and the trainer that trains it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from yrunner.assembly.run import Run
from yrunner.console import say
from yrunner.data.batching.collate import BatchLayout, choose_layout
from yrunner.data.batching.plan import Plan
from yrunner.data.conversation import TokenizedExample
from yrunner.distributed.collectives import this_rank
from yrunner.errors import Interrupted
from yrunner.models.errors import quiet_libraries
from yrunner.models.limits import check_isolation, isolates_examples
from yrunner.models.load import check_vocabulary, load_model
from yrunner.models.quantization import quantization_config
from yrunner.models.save import ModelCard, save_model
from yrunner.models.scratch import build_model
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.model import QloraTuning
from yrunner.recipe.schema.recipe import Recipe
from yrunner.storage.run_dir import RunDir
from yrunner.training.arguments import make_arguments, token_weight
from yrunner.training.callbacks import Cadence
from yrunner.training.drift import StopOnDrift
from yrunner.training.metrics import MetricsFile
from yrunner.training.progress import LiveProgress
from yrunner.training.trackers import tracker_callbacks
from yrunner.training.trainer import SignalTrainer, Watcher


def untrained_model(run: Run) -> Any:
    """The model as the recipe starts to train it: loaded or built anew, and ready to be tuned."""
    recipe = run.recipe
    # Under mixed precision trained weights stay in float32; apply_tuning sees to it.
    if recipe.model.scratch is not None:
        model: Any = build_model(recipe.model.scratch.config, run.tokenizer, recipe.seed)
    else:
        model = load_model(
            run.base_source,
            dtype=run.dtype,
            attention=recipe.model.attention,
            trust_remote_code=recipe.model.trust_remote_code,
            quantization=_quantization(run),
        )
    check_vocabulary(model, run.tokenizer)
    set_seed(recipe.seed)
    return apply_tuning(model, recipe.tuning)


def _quantization(run: Run) -> Any:
    tuning = run.recipe.tuning
    if not isinstance(tuning, QloraTuning):
        return None
    return quantization_config(tuning.quant_type, double_quant=tuning.double_quant, dtype=run.dtype)


def has_base_beneath(recipe: Recipe) -> bool:
    """Whether the trained model with its adapter off is the model as it was before training."""
    tuning = recipe.tuning
    return tuning.kind not in ("full", "freeze") and getattr(tuning, "adapter", None) is None


@dataclass(frozen=True)
class TrainingTask:
    """What a trainer learns from, where it writes, and who takes part."""

    plan: Plan
    train: Sequence[TokenizedExample]
    folder: RunDir
    callbacks: Sequence[TrainerCallback]
    """They decide what is logged and saved."""
    validation: Sequence[TokenizedExample] = ()
    watchers: Sequence[Watcher] = ()


def training_arguments(
    run: Run, plan: Plan, micro_steps: int, deepspeed: dict[str, Any] | None
) -> TrainingArguments:
    """transformers' arguments. Under ZeRO-3 they have to be made before the model is loaded."""
    return make_arguments(
        run.recipe.train,
        folder=run.folder.checkpoints,
        name=run.recipe.name,
        num_updates=plan.num_updates,
        seed=run.recipe.seed,
        dtype=run.dtype,
        validates=bool(run.dataset.validation),
        micro_steps=micro_steps,
        deepspeed=deepspeed,
    )


def run_trainer(
    run: Run, model: Any, plan: Plan, arguments: TrainingArguments
) -> tuple[SignalTrainer, Cadence]:
    """The trainer of a run: validated, logged, tracked and saved as its recipe says."""
    train = run.recipe.train
    cadence = Cadence(
        epoch_ends=plan.epoch_ends,
        log_every=train.log_every,
        checkpoint_every=train.checkpoint.every,
        validates=bool(run.dataset.validation),
    )
    weight, _ = token_weight(run.recipe.loss)
    trackers = tracker_callbacks(train.trackers, run.folder.trackers, weight)
    callbacks: list[Any] = [cadence, MetricsFile(run.folder.metrics), *trackers]
    if train.early_stopping is not None:
        stop = StopOnDrift if train.early_stopping.metric == "drift" else EarlyStoppingCallback
        callbacks.append(stop(train.early_stopping.patience))
    task = TrainingTask(
        plan=plan,
        train=run.dataset.train,
        validation=run.dataset.validation,
        folder=run.folder,
        callbacks=callbacks,
        watchers=[tracker.histograms for tracker in trackers],
    )
    return make_trainer(run, model, arguments, task), cadence


def make_trainer(
    run: Run, model: Any, arguments: TrainingArguments, task: TrainingTask
) -> SignalTrainer:
    """A trainer by the recipe's tuning and loss."""
    recipe = run.recipe
    weight, loss_deadline = token_weight(recipe.loss)
    trainer = SignalTrainer(
        model=model,
        args=arguments,
        callbacks=list(task.callbacks),
        train_examples=task.train,
        validation_examples=task.validation,
        plan=task.plan,
        token_batch=recipe.train.token_batch,
        weight=weight,
        loss_deadline=loss_deadline,
        normalize=recipe.loss.normalize,
        pad_token_id=run.tokenizer.pad_token_id,
        run_dir=task.folder,
        keep_checkpoints=recipe.train.checkpoint.keep,
        torch_compile=recipe.train.torch_compile,
        spikes=recipe.train.spikes,
        watchers=task.watchers,
    )
    trainer.when_model_runs(lambda: trainer.use_layout(_choose_layout(run, trainer)))
    return trainer


def train_to_the_end(trainer: SignalTrainer, cadence: Cadence, run: Run) -> None:
    """Train, and raise `Interrupted` where a signal stopped it; the checkpoint is complete then."""
    step = run.options.from_step
    checkpoint = None if step is None else str(run.folder.checkpoint(step))
    with cadence.stopping_on_signals(), LiveProgress(run.recipe.name) as progress:
        trainer.add_callback(progress)
        with quiet_libraries():
            trainer.train(resume_from_checkpoint=checkpoint)
    stopping, state = run.recipe.train.early_stopping, trainer.state
    if cadence.interrupted_by is not None:
        raise Interrupted(
            cadence.interrupted_by,
            state.global_step,
            run.folder.folder,
            remedy=run.options.how_to_resume,
        )
    if stopping is not None and state.global_step < state.max_steps and this_rank() == 0:
        say(
            f"ended after update {state.global_step:,} of {state.max_steps:,}: train.early_stopping"
            f", metric {stopping.metric}, patience {stopping.patience}"
        )


def save_result(trainer: SignalTrainer, run: Run, card: ModelCard, weights: Any) -> None:
    """Write `model/`. `weights` are those of the model where it does not hold them (ZeRO-3)."""
    with quiet_libraries():
        model = trainer.accelerator.unwrap_model(trainer.model)
    save_model(model, run.tokenizer, run.folder.model, card, weights=weights)


def mixed_precision(trainer: SignalTrainer, dtype: torch.dtype) -> torch.autocast:
    """Measure in the precision of the training: trained weights are float32, frozen ones not."""
    enabled = dtype != torch.float32
    return torch.autocast(trainer.args.device.type, dtype=dtype, enabled=enabled)


def _choose_layout(run: Run, trainer: SignalTrainer) -> BatchLayout:
    """How micro-batches are laid out; the trainer has brought the model to its device.

    Raises `ModelError` where the model would mix the examples of a packed row.
    """
    model: Any = trainer.model
    packs = run.recipe.data.packing
    with mixed_precision(trainer, run.dtype):
        if packs:
            check_isolation(model)
        isolates = packs or isolates_examples(model)
    return layout_for(model.config, isolates=isolates)


def layout_for(config: Any, *, isolates: bool) -> BatchLayout:
    """The cheapest layout of micro-batches for a model of this config.

    `isolates`: whether the model keeps examples that share a row apart.
    """
    text = config.get_text_config()
    return choose_layout(text._attn_implementation, hidden_size=text.hidden_size, isolates=isolates)
