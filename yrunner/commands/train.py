"""`yrun train`: from a recipe to a tuned model, measured before and after."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, set_seed

from yrunner.commands.base import base_source, stale_base
from yrunner.commands.environment import describe_environment
from yrunner.commands.evaluate import known_faults
from yrunner.commands.fingerprint import changes_since, fingerprint
from yrunner.commands.measure import Measured, measure, read_tasks
from yrunner.commands.tokenizer import recipe_tokenizer
from yrunner.commands.train_data import check_rows, prepare_data
from yrunner.commands.train_plan import layout_for, plan_run
from yrunner.commands.train_story import (
    model_card,
    say_next,
    say_plan,
    say_result,
    write_run_report,
)
from yrunner.console import say
from yrunner.data.layouts import Layout
from yrunner.data.plan import Plan
from yrunner.data.prepared import Prepared
from yrunner.data.report import as_json
from yrunner.errors import Interrupted, MissingError, RunError
from yrunner.models.export import save_model
from yrunner.models.isolation import check_isolation, isolates_examples
from yrunner.models.load import check_vocabulary, choose_dtype, load_model
from yrunner.models.quiet import quiet_libraries
from yrunner.models.scratch import build_model
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.load import base_recipe_path, load_recipe, recipe_to_yaml
from yrunner.recipe.schema import Recipe
from yrunner.run_dir import RunDir, write_json, write_text
from yrunner.training.arguments import make_arguments, token_weight
from yrunner.training.cadence import Cadence
from yrunner.training.compilation import check_compiler
from yrunner.training.metrics_file import MetricsFile
from yrunner.training.progress import LiveProgress
from yrunner.training.trackers import check_trackers, tracker_callbacks
from yrunner.training.trainer import SignalTrainer


def train(path: Path, overrides: list[str], *, resume: bool, overwrite: bool) -> None:
    """Train the recipe at `path`, and its base before it where that is missing or has changed."""
    order = Order(shlex.join([str(path), *overrides]), resume=resume, overwrite=overwrite)
    train_recipe(load_recipe(path, overrides), order)


@dataclass(frozen=True)
class Order:
    """How a run was asked for."""

    arguments: str
    """Recipe and overrides as they were typed, for the commands that a person is told of."""
    resume: bool = False
    overwrite: bool = False
    is_base: bool = False
    """Trained only because another recipe starts from it."""

    @property
    def to_go_on(self) -> str:
        """How an interrupted run is taken up again."""
        if self.is_base:
            return "run the same command again to go on"
        return f"go on with: yrun train {self.arguments} --resume"


def train_recipe(recipe: Recipe, order: Order) -> None:
    """Train one recipe; see `train`."""
    run_dir = RunDir(recipe.run_folder)
    _check_run_folder(run_dir, recipe, order)
    if order.resume and run_dir.is_finished():
        say(f"{recipe.name} is finished: {run_dir.model}")
        return
    check_trackers(recipe.train.trackers)
    if recipe.train.torch_compile:
        check_compiler()
    read_tasks(recipe)
    known_faults(recipe)
    stale = stale_base(recipe)
    if stale is not None:
        # Training the base takes long: what can be known to fail after it is looked for before.
        check_rows(recipe)
        base, reason = stale
        say(reason)
        base_dir = RunDir(base.run_folder)
        goes_on = bool(base_dir.saved_steps()) and not changes_since(base_dir, base)
        path = str(base_recipe_path(recipe))
        train_recipe(base, Order(path, resume=goes_on, overwrite=not goes_on, is_base=True))
    _run(recipe, run_dir, order)


def _check_run_folder(run_dir: RunDir, recipe: Recipe, order: Order) -> None:
    """Refuse what could lose a run, before any time is spent."""
    if not order.resume:
        if run_dir.is_used() and not order.overwrite:
            run_dir.create()  # raises, with what to do
        return
    if not run_dir.fingerprint.exists():
        raise RunError(
            f"{run_dir.folder} holds no run to resume", remedy="start it without --resume"
        )
    changes = changes_since(run_dir, recipe)
    if changes:
        raise RunError(
            f"{run_dir.folder} was trained with other settings: {', '.join(changes)}",
            remedy="set them back to resume it, or start anew with --overwrite",
        )
    if not run_dir.saved_steps() and not run_dir.is_finished():
        raise RunError(
            f"{run_dir.folder} has no checkpoint yet", remedy="start anew with --overwrite"
        )


def _run(recipe: Recipe, run_dir: RunDir, order: Order) -> None:
    """The run itself. Nothing is written before the data is known to be sound."""
    tasks = read_tasks(recipe)
    tokenizer = recipe_tokenizer(recipe)
    prepared = prepare_data(recipe, tokenizer)
    plan = plan_run(recipe, prepared)
    dtype = _check_device(recipe)
    if not order.resume:
        _open_run_folder(recipe, run_dir, prepared, overwrite=order.overwrite)

    # TrainingArguments come before the model: under DeepSpeed ZeRO-3 they decide how weights load.
    arguments = make_arguments(
        recipe.train,
        folder=run_dir.checkpoints,
        name=recipe.name,
        num_updates=plan.num_updates,
        seed=recipe.seed,
        dtype=dtype,
        validates=bool(prepared.validation),
    )
    model = _load_model(recipe, tokenizer, dtype)
    say_plan(recipe, model, prepared, plan)
    trainer, cadence = _make_trainer(recipe, model, tokenizer, prepared, plan, arguments, run_dir)
    trainer.use_layout(_choose_layout(recipe, trainer, dtype))
    watched = prepared.validation or prepared.train
    if order.resume:
        before = Measured.load(run_dir.before)
    else:
        with _mixed_precision(trainer, dtype):
            before = measure(model, tokenizer, recipe, tasks, watched, "before")
        before.save(run_dir.before)

    _train(trainer, cadence, recipe, run_dir, order)

    with _mixed_precision(trainer, dtype):
        after = measure(model, tokenizer, recipe, tasks, watched, "after")
    after.save(run_dir.after)
    card = model_card(recipe, run_dir, before, after)
    save_model(trainer.accelerator.unwrap_model(trainer.model), tokenizer, run_dir.model, card)
    write_run_report(recipe, run_dir, before, after)
    say_result(recipe, run_dir, before, after)
    if not order.is_base:
        say_next(recipe, order.arguments)


def _load_model(recipe: Recipe, tokenizer: Any, dtype: torch.dtype) -> Any:
    # Under mixed precision trained weights stay in float32; apply_tuning sees to it.
    if recipe.model.scratch is not None:
        model: Any = build_model(recipe.model.scratch.config, tokenizer, recipe.seed)
    else:
        model = load_model(
            base_source(recipe),
            dtype=dtype,
            attention=recipe.model.attention,
            trust_remote_code=recipe.model.trust_remote_code,
        )
    check_vocabulary(model, tokenizer)
    set_seed(recipe.seed)
    return apply_tuning(model, recipe.tuning)


def _check_device(recipe: Recipe) -> torch.dtype:
    """The precision to compute in. Raises `MissingError` where this machine does not have it."""
    dtype = choose_dtype(recipe.model.dtype)
    if dtype == torch.float16 and not torch.cuda.is_available():
        raise MissingError(
            "model.dtype float16 needs a GPU", remedy="use float32 or bfloat16 on a CPU"
        )
    return dtype


def _mixed_precision(trainer: SignalTrainer, dtype: torch.dtype) -> torch.autocast:
    """Measure in the precision of the training: trained weights are float32, frozen ones not."""
    enabled = dtype != torch.float32
    return torch.autocast(trainer.args.device.type, dtype=dtype, enabled=enabled)


def _open_run_folder(
    recipe: Recipe, run_dir: RunDir, prepared: Prepared, *, overwrite: bool
) -> None:
    if overwrite:
        run_dir.clear()
    run_dir.create()
    write_text(run_dir.recipe, recipe_to_yaml(recipe))
    write_json(run_dir.fingerprint, fingerprint(recipe))
    write_json(run_dir.environment, describe_environment())
    write_json(run_dir.data_report, as_json(prepared.reports, prepared.findings))


def _make_trainer(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    prepared: Prepared,
    plan: Plan,
    arguments: Any,
    run_dir: RunDir,
) -> tuple[SignalTrainer, Cadence]:
    weight, loss_deadline = token_weight(recipe.loss)
    cadence = Cadence(
        epoch_ends=plan.epoch_ends,
        log_every=recipe.train.log_every,
        checkpoint_every=recipe.train.checkpoint.every,
        validates=bool(prepared.validation),
    )
    trackers = tracker_callbacks(recipe.train.trackers, run_dir.trackers, weight)
    callbacks: list[Any] = [cadence, MetricsFile(run_dir.metrics), *trackers]
    if recipe.train.early_stopping is not None:
        callbacks.append(EarlyStoppingCallback(recipe.train.early_stopping.patience))
    trainer = SignalTrainer(
        model=model,
        args=arguments,
        callbacks=callbacks,
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
        watchers=[tracker.histograms.add for tracker in trackers],
    )
    return trainer, cadence


def _choose_layout(recipe: Recipe, trainer: SignalTrainer, dtype: torch.dtype) -> Layout:
    """How micro-batches are laid out; the trainer has brought the model to its device.

    Raises `ModelError` where the model would mix the examples of a packed row.
    """
    model: Any = trainer.model
    with _mixed_precision(trainer, dtype):
        if recipe.data.packing:
            check_isolation(model)
        isolates = recipe.data.packing or isolates_examples(model)
    return layout_for(model.config, isolates=isolates)


def _train(
    trainer: SignalTrainer, cadence: Cadence, recipe: Recipe, run_dir: RunDir, order: Order
) -> None:
    """Train, and raise `Interrupted` where a signal stopped it; the checkpoint is whole then."""
    steps = run_dir.saved_steps()
    checkpoint = str(run_dir.checkpoint(steps[-1])) if order.resume else None
    with cadence.stopping_on_signals(), LiveProgress(recipe.name) as progress:
        trainer.add_callback(progress)
        with quiet_libraries():
            trainer.train(resume_from_checkpoint=checkpoint)
    finished = trainer.state.global_step >= trainer.state.max_steps
    if cadence.interrupted_by is not None and not finished:
        step = trainer.state.global_step
        raise Interrupted(cadence.interrupted_by, step, run_dir.folder, remedy=order.to_go_on)
