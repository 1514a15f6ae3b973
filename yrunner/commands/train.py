"""`yrun train`: from a recipe to a tuned model, measured before and after."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import EarlyStoppingCallback

from yrunner.commands.base import stale_base
from yrunner.commands.base_record import base_record
from yrunner.commands.environment import describe_environment
from yrunner.commands.evaluate import known_faults
from yrunner.commands.fingerprint import changes_since, fingerprint
from yrunner.commands.measure import Measured, measure, read_tasks
from yrunner.commands.tokenizer import recipe_tokenizer
from yrunner.commands.train_data import check_rows, prepare_data
from yrunner.commands.train_model import (
    make_trainer,
    mixed_precision,
    training_dtype,
    untrained_model,
)
from yrunner.commands.train_needs import check_needs
from yrunner.commands.train_plan import plan_run
from yrunner.commands.train_ranks import (
    check_sharing,
    keeps_run_folder,
    launch,
    meet_ranks,
    ranks_to_launch,
    say_launch,
    updates_shared,
)
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
from yrunner.errors import Interrupted, RunError
from yrunner.launch import Place, current_place
from yrunner.models.export import save_model
from yrunner.models.quiet import quiet_libraries
from yrunner.ranks import leave_ranks
from yrunner.recipe.load import base_recipe_path, load_recipe, recipe_to_yaml
from yrunner.recipe.schema import Recipe
from yrunner.run_dir import RunDir, write_json, write_text
from yrunner.training.arguments import make_arguments, token_weight
from yrunner.training.cadence import Cadence
from yrunner.training.metrics_file import MetricsFile
from yrunner.training.progress import LiveProgress
from yrunner.training.trackers import tracker_callbacks
from yrunner.training.trainer import SignalTrainer


def train(
    path: Path,
    overrides: list[str],
    *,
    resume: bool,
    overwrite: bool,
    print_launch: bool = False,
    is_base: bool = False,
) -> None:
    """Train the recipe at `path`, and before it a base that is missing or has changed.

    `print_launch`: only print the command that starts its processes.
    """
    order = Order(shlex.join([str(path), *overrides]), resume, overwrite, is_base)
    recipe = load_recipe(path, overrides)
    if print_launch:
        say_launch(recipe, order.arguments, order.options)
    else:
        train_recipe(recipe, order)


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
    def options(self) -> list[str]:
        """As options of the command."""
        said = {"--resume": self.resume, "--overwrite": self.overwrite, "--is-base": self.is_base}
        return [option for option, is_set in said.items() if is_set]

    @property
    def to_go_on(self) -> str:
        """How an interrupted run is taken up again."""
        if self.is_base:
            return "run the same command again to go on"
        return f"go on with: yrun train {self.arguments} --resume"


def train_recipe(recipe: Recipe, order: Order) -> None:
    """Train one recipe; see `train`."""
    run_dir = RunDir(recipe.run_folder)
    layout = ranks_to_launch(recipe)
    if keeps_run_folder(layout):
        _check_run_folder(run_dir, recipe, order)
    if order.resume and run_dir.is_finished():
        say(f"{recipe.name} is finished: {run_dir.model}")
        return
    check_needs(recipe)
    read_tasks(recipe)
    known_faults(recipe)
    if layout is not None:
        check_sharing(recipe, run_dir, layout, resume=order.resume)
    if current_place() is None:
        train_base(recipe)
    if layout is None:
        _run(recipe, run_dir, order)
    else:
        launch(recipe, layout, order.arguments, order.options)


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
    place = current_place() or Place(0, 1)
    begun_by, micro_steps = updates_shared(recipe, run_dir, place.num_ranks, resume=order.resume)
    plan = plan_run(recipe, prepared, num_ranks=begun_by)
    dtype = training_dtype(recipe)
    if (is_writer := place.rank == 0) and not order.resume:
        _open_run_folder(recipe, run_dir, prepared, place.num_ranks, overwrite=order.overwrite)
    # Not before the data is there: who waits for it would one day wait in vain.
    deepspeed = meet_ranks(recipe)
    # TrainingArguments come before the model: under DeepSpeed ZeRO-3 they decide how weights load.
    arguments = make_arguments(
        recipe.train,
        folder=run_dir.checkpoints,
        name=recipe.name,
        num_updates=plan.num_updates,
        seed=recipe.seed,
        dtype=dtype,
        validates=bool(prepared.validation),
        micro_steps=micro_steps,
        deepspeed=deepspeed,
    )
    model = untrained_model(recipe, tokenizer, dtype)
    say_plan(recipe, model, prepared, plan)
    trainer, cadence = _make_trainer(recipe, model, tokenizer, prepared, plan, arguments, run_dir)

    def measured(when: str) -> Measured:
        watched = prepared.validation or prepared.train
        with mixed_precision(trainer, dtype):
            return measure(model, tokenizer, recipe, tasks, watched, when)

    def measure_before() -> None:
        before = measured("before")
        if is_writer:
            before.save(run_dir.before)

    if not order.resume:
        trainer.when_model_runs(measure_before)
    _train(trainer, cadence, recipe, run_dir, order)
    after = measured("after")
    weights = None if trainer.zero is None else trainer.zero.whole_weights()
    if is_writer:
        _finish(recipe, run_dir, order, trainer, tokenizer, after, weights)
    leave_ranks()


def _finish(
    recipe: Recipe,
    run_dir: RunDir,
    order: Order,
    trainer: SignalTrainer,
    tokenizer: Any,
    after: Measured,
    weights: dict[str, Tensor] | None,
) -> None:
    """Write and show the result. `weights` are those of the model where it does not hold them."""
    before = Measured.load(run_dir.before)
    after.save(run_dir.after)
    card = model_card(recipe, run_dir, before, after)
    with quiet_libraries():
        model = trainer.accelerator.unwrap_model(trainer.model)
    save_model(model, tokenizer, run_dir.model, card, weights=weights)
    write_run_report(recipe, run_dir, before, after)
    say_result(recipe, run_dir, before, after)
    if not order.is_base:
        say_next(recipe, order.arguments)


def _open_run_folder(
    recipe: Recipe, run_dir: RunDir, prepared: Prepared, num_ranks: int, *, overwrite: bool
) -> None:
    if overwrite:
        run_dir.clear()
    run_dir.create()
    write_text(run_dir.recipe, recipe_to_yaml(recipe))
    write_json(run_dir.fingerprint, fingerprint(recipe))
    if recipe.model.base is not None:
        write_json(run_dir.base, base_record(recipe))
    write_json(run_dir.environment, {**describe_environment(), "processes": num_ranks})
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
    if recipe.train.early_stopping is not None:
        callbacks.append(EarlyStoppingCallback(recipe.train.early_stopping.patience))
    trainer = make_trainer(
        recipe,
        model,
        tokenizer,
        prepared,
        plan,
        arguments,
        run_dir,
        callbacks=callbacks,
        watchers=[tracker.histograms.add for tracker in trackers],
    )
    return trainer, cadence


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
