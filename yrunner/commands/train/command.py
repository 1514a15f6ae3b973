"""`yrun train`: from a recipe to a tuned model, measured before and after.

What a training needs of this machine, looked for before any time is spent.

How a training was asked for, and what that may do to its run folder.
"""

import shlex
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import EarlyStoppingCallback

from yrunner.assembly.base_record import base_record, check_base
from yrunner.assembly.dataset import check_rows, prepare_data, recipe_sources
from yrunner.assembly.identity import changes_since, describe_environment, fingerprint
from yrunner.assembly.keep import add_regulariser, record_kept
from yrunner.assembly.measure import Measured, known_faults, measure, read_tasks
from yrunner.assembly.memory import check_disk, check_fit
from yrunner.assembly.model import recipe_tokenizer, stale_base
from yrunner.assembly.plan import plan_run
from yrunner.assembly.replay import check_keep_file, prepare_keep
from yrunner.assembly.story import model_card, say_next, say_plan, say_result, write_run_report
from yrunner.assembly.trainer import make_trainer, mixed_precision, training_dtype, untrained_model
from yrunner.commands.train.failures import explaining_stops
from yrunner.commands.train.ranks import (
    check_sharing,
    init_process_group,
    keeps_run_folder,
    launch,
    ranks_to_launch,
    say_launch,
    updates_shared,
)
from yrunner.commands.train.resume import check_resume, find_start, take_up
from yrunner.console import say
from yrunner.data.batching.plan import Plan
from yrunner.data.dataset.row_report import as_json
from yrunner.data.dataset.splits import Prepared
from yrunner.data.readers.text import check_unchanged, states_of
from yrunner.distributed.collectives import leave_ranks, this_rank, wait_for_ranks
from yrunner.distributed.launcher import ProcessRank, current_place
from yrunner.errors import Interrupted
from yrunner.models.errors import quiet_libraries
from yrunner.models.quantization import need_bitsandbytes
from yrunner.models.save import save_model
from yrunner.recipe.load import base_recipe_path, load_recipe, recipe_to_yaml
from yrunner.recipe.schema.model import QloraTuning
from yrunner.recipe.schema.recipe import Recipe
from yrunner.storage.run_dir import RunDir, write_json, write_text
from yrunner.storage.run_lock import run_lock
from yrunner.training.arguments import make_arguments, token_weight
from yrunner.training.callbacks import Cadence, telling_how_to_go_on
from yrunner.training.compile import check_compiler
from yrunner.training.drift import StopOnDrift
from yrunner.training.memory.trace import OF_BITSANDBYTES
from yrunner.training.metrics import MetricsFile
from yrunner.training.progress import LiveProgress
from yrunner.training.trackers import check_trackers, tracker_callbacks
from yrunner.training.trainer import SignalTrainer


def check_needs(recipe: Recipe) -> None:
    """Raise `MissingError` for a package or a compiler that is not there."""
    check_trackers(recipe.train.trackers)
    if recipe.train.torch_compile:
        check_compiler()
    if recipe.train.optimizer in OF_BITSANDBYTES:
        need_bitsandbytes(f"train.optimizer {recipe.train.optimizer}")
    if isinstance(recipe.tuning, QloraTuning):
        need_bitsandbytes("tuning.kind qlora")


@dataclass(frozen=True)
class RunOptions:
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


def check_run_folder(run_dir: RunDir, recipe: Recipe, order: RunOptions) -> None:
    """Refuse what could lose a run, before any time is spent."""
    run_dir.check(*run_dir.folders() if order.overwrite else [run_dir.checkpoints])
    if order.resume:
        check_resume(run_dir, recipe)
    elif run_dir.is_used() and not order.overwrite:
        run_dir.create()  # raises, with what to do


def say_finished(recipe: Recipe, run_dir: RunDir) -> None:
    """A kill can have come between the model and its report, which is written now."""
    if not run_dir.report.exists():
        measured = [Measured.load(path) for path in (run_dir.before, run_dir.after)]
        write_run_report(recipe, run_dir, *measured)
    say(f"{recipe.name} is finished: {run_dir.model}")


def begin_or_take_up(
    recipe: Recipe,
    run_dir: RunDir,
    order: RunOptions,
    prepared: Prepared,
    plan: Plan,
    num_ranks: int,
) -> None:
    """Write down what the run is, begun by so many processes; or how a stopped one goes on."""
    if order.from_step is None:
        _open_run_folder(recipe, run_dir, prepared, num_ranks, overwrite=order.overwrite)
        return
    if recipe.model.base is not None:
        check_base(recipe, run_dir)
    take_up(run_dir, recipe, order.from_step, plan.num_updates)


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
    order = RunOptions(shlex.join([str(path), *overrides]), resume, overwrite, is_base)
    recipe = load_recipe(path, overrides)
    if print_launch:
        say_launch(recipe, order.arguments, order.options)
    else:
        train_recipe(recipe, order)


def train_recipe(recipe: Recipe, order: RunOptions) -> None:
    """Train one recipe; see `train`."""
    run_dir = RunDir(recipe.run_folder)
    layout = ranks_to_launch(recipe)
    is_keeper = keeps_run_folder(layout)
    # The processes of a run stand under the lock of the command that has started them.
    with run_lock(run_dir.folder) if is_keeper and current_place() is None else nullcontext():
        if is_keeper:
            check_run_folder(run_dir, recipe, order)
        if order.resume and run_dir.is_finished():
            say_finished(recipe, run_dir)
            return
        check_needs(recipe)
        read_tasks(recipe)
        known_faults(recipe)
        if order.resume:
            step = find_start(run_dir)
            order = replace(order, resume=step is not None, overwrite=step is None, from_step=step)
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
    train_recipe(base, RunOptions(path, resume=goes_on, overwrite=not goes_on, is_base=True))


def _run(recipe: Recipe, run_dir: RunDir, order: RunOptions) -> None:
    """The run itself. Nothing is written before the data and the disk are known to do."""
    states = states_of(file for source in recipe_sources(recipe) for file in source.files)
    tokenizer = recipe_tokenizer(recipe)
    prepared = prepare_data(recipe, tokenizer)
    check_fit(recipe, tokenizer, prepared)
    check_keep_file(recipe, tokenizer)
    place = current_place() or ProcessRank(0, 1)
    begun_by, micro_steps = updates_shared(recipe, run_dir, place.num_ranks, resume=order.resume)
    plan = plan_run(recipe, prepared, num_ranks=begun_by)
    dtype = training_dtype(recipe)
    kept = prepare_keep(recipe, tokenizer, dtype)
    # Not before the data is there: who waits for it would one day wait in vain.
    deepspeed = init_process_group(recipe)
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
    if place.rank == 0:
        check_disk(recipe, model, tokenizer, plan)
        begin_or_take_up(recipe, run_dir, order, prepared, plan, place.num_ranks)
        record_kept(run_dir, kept, resume=order.from_step is not None)
    # The fingerprint is of the files as they were then.
    check_unchanged(states)
    wait_for_ranks()
    say_plan(recipe, model, prepared, plan)
    with telling_how_to_go_on(order.to_go_on):
        trainer, cadence = _make_trainer(
            recipe, model, tokenizer, prepared, plan, arguments, run_dir
        )
        with explaining_stops(trainer, recipe, tokenizer, run_dir):
            with mixed_precision(trainer, dtype):
                add_regulariser(trainer, recipe, kept)
            _measure_and_train(trainer, cadence, recipe, tokenizer, prepared, run_dir, order)
    leave_ranks(together=True)


def _measure_and_train(
    trainer: SignalTrainer,
    cadence: Cadence,
    recipe: Recipe,
    tokenizer: Any,
    prepared: Prepared,
    run_dir: RunDir,
    order: RunOptions,
) -> None:
    """Measure, train, measure again, and write down what came of it."""
    tasks, dtype = read_tasks(recipe), training_dtype(recipe)
    is_writer = this_rank() == 0

    def measured(when: str) -> Measured:
        watched = prepared.validation or prepared.train
        with mixed_precision(trainer, dtype):
            return measure(trainer.model, tokenizer, recipe, tasks, watched, when)

    def measure_before() -> None:
        before = measured("before")
        if is_writer:
            before.save(run_dir.before)

    if order.from_step is None:
        trainer.when_model_runs(measure_before)
    _train(trainer, cadence, recipe, run_dir, order)
    after = measured("after")
    weights = None if trainer.zero is None else trainer.zero.whole_weights()
    if is_writer:
        _finish(recipe, run_dir, order, trainer, tokenizer, after, weights)


def _finish(
    recipe: Recipe,
    run_dir: RunDir,
    order: RunOptions,
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
    trainer: SignalTrainer, cadence: Cadence, recipe: Recipe, run_dir: RunDir, order: RunOptions
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
    stopping, state = recipe.train.early_stopping, trainer.state
    if stopping is not None and state.global_step < state.max_steps and this_rank() == 0:
        say(
            f"ended after update {state.global_step:,} of {state.max_steps:,}: train.early_stopping"
            f", metric {stopping.metric}, patience {stopping.patience}"
        )
