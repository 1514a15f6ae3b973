"""`yrun train`: from a recipe to a tuned model, measured before and after."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback

from yrunner.commands.base import stale_base
from yrunner.commands.base_record import base_record, check_base
from yrunner.commands.data_files import recipe_sources
from yrunner.commands.disk_space import check_disk
from yrunner.commands.environment import describe_environment
from yrunner.commands.evaluate import known_faults
from yrunner.commands.fingerprint import changes_since, fingerprint
from yrunner.commands.keep import hold_back, record_kept
from yrunner.commands.keep_data import check_keep_file, prepare_keep
from yrunner.commands.measure import Measured, measure, read_tasks
from yrunner.commands.positions import check_positions
from yrunner.commands.resume import check_resume, find_start, take_up
from yrunner.commands.tokenizer import recipe_tokenizer
from yrunner.commands.train_data import check_rows, prepare_data
from yrunner.commands.train_faults import explaining_stops
from yrunner.commands.train_model import (
    make_trainer,
    mixed_precision,
    training_dtype,
    untrained_model,
)
from yrunner.commands.train_plan import plan_run
from yrunner.commands.train_story import (
    model_card,
    say_next,
    say_plan,
    say_result,
    write_run_report,
)
from yrunner.console import say
from yrunner.data.plan import Plan
from yrunner.data.prepared import Prepared
from yrunner.data.report import as_json
from yrunner.data.unchanged import check_unchanged, states_of
from yrunner.errors import Interrupted
from yrunner.models.export import save_model
from yrunner.models.quiet import quiet_libraries
from yrunner.recipe.load import base_recipe_path, load_recipe, recipe_to_yaml
from yrunner.recipe.schema import Recipe
from yrunner.run_dir import RunDir, write_json, write_text
from yrunner.training.arguments import make_arguments, token_weight
from yrunner.training.cadence import Cadence
from yrunner.training.compilation import check_compiler
from yrunner.training.drift import StopOnDrift
from yrunner.training.metrics_file import MetricsFile
from yrunner.training.progress import LiveProgress
from yrunner.training.run_lock import run_lock
from yrunner.training.signals import telling_how_to_go_on
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
    from_step: int | None = None
    """The update whose checkpoint a resumed run goes on from."""

    @property
    def to_go_on(self) -> str:
        """How an interrupted run is taken up again."""
        if self.is_base:
            return "run the same command again to go on"
        return f"go on with: yrun train {self.arguments} --resume"


def train_recipe(recipe: Recipe, order: Order) -> None:
    """Train one recipe; see `train`."""
    run_dir = RunDir(recipe.run_folder)
    with run_lock(run_dir.folder):
        _check_run_folder(run_dir, recipe, order)
        if order.resume and run_dir.is_finished():
            _say_finished(recipe, run_dir)
            return
        check_trackers(recipe.train.trackers)
        if recipe.train.torch_compile:
            check_compiler()
        read_tasks(recipe)
        known_faults(recipe)
        if order.resume:
            step = find_start(run_dir)
            order = replace(order, resume=step is not None, overwrite=step is None, from_step=step)
        train_base(recipe)
        _run(recipe, run_dir, order)


def _say_finished(recipe: Recipe, run_dir: RunDir) -> None:
    """A kill can have come between the model and its report, which is written now."""
    if not run_dir.report.exists():
        measured = [Measured.load(path) for path in (run_dir.before, run_dir.after)]
        write_run_report(recipe, run_dir, *measured)
    say(f"{recipe.name} is finished: {run_dir.model}")


def train_base(recipe: Recipe) -> None:
    """Train the base of a recipe where that is a recipe without a result, or has changed."""
    stale = stale_base(recipe)
    if stale is None:
        return
    # It takes long: what can be known to fail after it is looked for before.
    check_rows(recipe)
    base, reason = stale
    say(reason)
    base_dir = RunDir(base.run_folder)
    goes_on = bool(base_dir.saved_steps()) and not changes_since(base_dir, base)
    path = str(base_recipe_path(recipe))
    train_recipe(base, Order(path, resume=goes_on, overwrite=not goes_on, is_base=True))


def _check_run_folder(run_dir: RunDir, recipe: Recipe, order: Order) -> None:
    """Refuse what could lose a run, before any time is spent."""
    run_dir.check(*run_dir.folders() if order.overwrite else [run_dir.checkpoints])
    if order.resume:
        check_resume(run_dir, recipe)
    elif run_dir.is_used() and not order.overwrite:
        run_dir.create()  # raises, with what to do


def _run(recipe: Recipe, run_dir: RunDir, order: Order) -> None:
    """The run itself. Nothing is written before the data and the disk are known to do."""
    states = states_of(file for source in recipe_sources(recipe) for file in source.files)
    tokenizer = recipe_tokenizer(recipe)
    prepared = prepare_data(recipe, tokenizer)
    check_positions(recipe, tokenizer, prepared)
    check_keep_file(recipe, tokenizer)
    plan = plan_run(recipe, prepared)
    dtype = training_dtype(recipe)
    kept = prepare_keep(recipe, tokenizer, dtype)
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
    model = untrained_model(recipe, tokenizer, dtype)
    check_disk(recipe, model, tokenizer)
    if order.from_step is None:
        _open_run_folder(recipe, run_dir, prepared, overwrite=order.overwrite)
    else:
        if recipe.model.base is not None:
            check_base(recipe, run_dir)
        take_up(run_dir, recipe, order.from_step, plan.num_updates)
    # The fingerprint is of the files as they were then.
    check_unchanged(states)
    say_plan(recipe, model, prepared, plan)
    record_kept(run_dir, kept, resume=order.from_step is not None)
    with telling_how_to_go_on(order.to_go_on):
        trainer, cadence = _make_trainer(
            recipe, model, tokenizer, prepared, plan, arguments, run_dir
        )
        with explaining_stops(trainer, recipe, tokenizer, run_dir):
            with mixed_precision(trainer, dtype):
                hold_back(trainer, recipe, kept)
            _measure_and_train(trainer, cadence, recipe, tokenizer, prepared, run_dir, order)


def _measure_and_train(
    trainer: SignalTrainer,
    cadence: Cadence,
    recipe: Recipe,
    tokenizer: Any,
    prepared: Prepared,
    run_dir: RunDir,
    order: Order,
) -> None:
    """Measure, train, measure again, and write down what came of it."""
    tasks, dtype = read_tasks(recipe), training_dtype(recipe)
    watched = prepared.validation or prepared.train
    if order.from_step is not None:
        before = Measured.load(run_dir.before)
    else:
        with mixed_precision(trainer, dtype):
            before = measure(trainer.model, tokenizer, recipe, tasks, watched, "before")
        before.save(run_dir.before)

    _train(trainer, cadence, recipe, run_dir, order)

    with mixed_precision(trainer, dtype):
        after = measure(trainer.model, tokenizer, recipe, tasks, watched, "after")
    after.save(run_dir.after)
    card = model_card(recipe, run_dir, before, after)
    save_model(trainer.accelerator.unwrap_model(trainer.model), tokenizer, run_dir.model, card)
    write_run_report(recipe, run_dir, before, after)
    say_result(recipe, run_dir, before, after)
    if not order.is_base:
        say_next(recipe, order.arguments)


def _open_run_folder(
    recipe: Recipe, run_dir: RunDir, prepared: Prepared, *, overwrite: bool
) -> None:
    if overwrite:
        run_dir.clear()
    run_dir.create()
    write_text(run_dir.recipe, recipe_to_yaml(recipe))
    write_json(run_dir.fingerprint, fingerprint(recipe))
    if recipe.model.base is not None:
        write_json(run_dir.base, base_record(recipe))
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
    cadence = Cadence(
        epoch_ends=plan.epoch_ends,
        log_every=recipe.train.log_every,
        checkpoint_every=recipe.train.checkpoint.every,
        validates=bool(prepared.validation),
    )
    weight, _ = token_weight(recipe.loss)
    trackers = tracker_callbacks(recipe.train.trackers, run_dir.trackers, weight)
    callbacks: list[Any] = [cadence, MetricsFile(run_dir.metrics), *trackers]
    stopping = recipe.train.early_stopping
    if stopping is not None:
        stop = StopOnDrift if stopping.metric == "drift" else EarlyStoppingCallback
        callbacks.append(stop(stopping.patience))
    trainer = make_trainer(
        recipe,
        model,
        tokenizer,
        prepared,
        plan,
        arguments,
        run_dir,
        callbacks=callbacks,
        watchers=[tracker.histograms for tracker in trackers],
    )
    return trainer, cadence


def _train(
    trainer: SignalTrainer, cadence: Cadence, recipe: Recipe, run_dir: RunDir, order: Order
) -> None:
    """Train, and raise `Interrupted` where a signal stopped it; the checkpoint is whole then."""
    step = order.from_step
    checkpoint = None if step is None else str(run_dir.checkpoint(step))
    with cadence.stopping_on_signals(), LiveProgress(recipe.name) as progress:
        trainer.add_callback(progress)
        with quiet_libraries():
            trainer.train(resume_from_checkpoint=checkpoint)
    if cadence.interrupted_by is not None:
        step = trainer.state.global_step
        raise Interrupted(cadence.interrupted_by, step, run_dir.folder, remedy=order.to_go_on)
