"""The model that a recipe trains and the trainer that trains it; `train` and `sort` share them."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed

from yrunner.assembly.model import base_source
from yrunner.assembly.plan import layout_for
from yrunner.data.batching.collate import BatchLayout
from yrunner.data.batching.plan import Plan
from yrunner.data.dataset.splits import Prepared
from yrunner.errors import MissingError
from yrunner.models.limits import check_isolation, isolates_examples
from yrunner.models.load import check_vocabulary, choose_dtype, load_model
from yrunner.models.quantization import quantization_config
from yrunner.models.scratch import build_model
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.model import QloraTuning
from yrunner.recipe.schema.recipe import Recipe
from yrunner.storage.run_dir import RunDir
from yrunner.training.arguments import token_weight
from yrunner.training.trainer import SignalTrainer, Watcher


def training_dtype(recipe: Recipe) -> torch.dtype:
    """The precision to compute in. Raises `MissingError` where this machine does not have it."""
    dtype = choose_dtype(recipe.model.dtype)
    if dtype == torch.float16 and not torch.cuda.is_available():
        raise MissingError(
            "model.dtype float16 needs a GPU", remedy="use float32 or bfloat16 on a CPU"
        )
    return dtype


def untrained_model(recipe: Recipe, tokenizer: Any, dtype: torch.dtype) -> Any:
    """The model as the recipe starts to train it: loaded or built anew, and ready to be tuned."""
    # Under mixed precision trained weights stay in float32; apply_tuning sees to it.
    if recipe.model.scratch is not None:
        model: Any = build_model(recipe.model.scratch.config, tokenizer, recipe.seed)
    else:
        model = load_model(
            base_source(recipe),
            dtype=dtype,
            attention=recipe.model.attention,
            trust_remote_code=recipe.model.trust_remote_code,
            quantization=_quantization(recipe, dtype),
        )
    check_vocabulary(model, tokenizer)
    set_seed(recipe.seed)
    return apply_tuning(model, recipe.tuning)


def _quantization(recipe: Recipe, dtype: torch.dtype) -> Any:
    tuning = recipe.tuning
    if not isinstance(tuning, QloraTuning):
        return None
    return quantization_config(tuning.quant_type, double_quant=tuning.double_quant, dtype=dtype)


def make_trainer(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    prepared: Prepared,
    plan: Plan,
    arguments: TrainingArguments,
    run_dir: RunDir,
    *,
    callbacks: Sequence[TrainerCallback],
    watchers: Sequence[Watcher] = (),
) -> SignalTrainer:
    """A trainer by the recipe's tuning and loss; `callbacks` decide what is logged and saved."""
    weight, loss_deadline = token_weight(recipe.loss)
    trainer = SignalTrainer(
        model=model,
        args=arguments,
        callbacks=list(callbacks),
        train_examples=prepared.train,
        validation_examples=prepared.validation,
        plan=plan,
        token_batch=recipe.train.token_batch,
        weight=weight,
        loss_deadline=loss_deadline,
        normalize=recipe.loss.normalize,
        pad_token_id=tokenizer.pad_token_id,
        run_dir=run_dir,
        keep_checkpoints=recipe.train.checkpoint.keep,
        torch_compile=recipe.train.torch_compile,
        spikes=recipe.train.spikes,
        watchers=watchers,
    )
    trainer.when_model_runs(lambda: trainer.use_layout(_choose_layout(recipe, trainer)))
    return trainer


def mixed_precision(trainer: SignalTrainer, dtype: torch.dtype) -> torch.autocast:
    """Measure in the precision of the training: trained weights are float32, frozen ones not."""
    enabled = dtype != torch.float32
    return torch.autocast(trainer.args.device.type, dtype=dtype, enabled=enabled)


def _choose_layout(recipe: Recipe, trainer: SignalTrainer) -> BatchLayout:
    """How micro-batches are laid out; the trainer has brought the model to its device.

    Raises `ModelError` where the model would mix the examples of a packed row.
    """
    model: Any = trainer.model
    with mixed_precision(trainer, training_dtype(recipe)):
        if recipe.data.packing:
            check_isolation(model)
        isolates = recipe.data.packing or isolates_examples(model)
    return layout_for(model.config, isolates=isolates)
