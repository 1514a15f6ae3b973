"""`yrun train`: from a recipe to a tuned model, measured before and after."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from yrunner.assembly.diagnosis import explaining_stops
from yrunner.assembly.keep import (
    add_regulariser,
    load_teacher,
    prepare_reference,
    prepare_teacher,
    record_rows,
    record_teacher,
)
from yrunner.assembly.measure import Measured, measure_after, measure_before
from yrunner.assembly.preflight import (
    Sorter,
    check_disk,
    check_fit,
    check_needs,
    findings_of_base,
    findings_of_export,
    findings_of_recipe,
    sort_rows,
)
from yrunner.assembly.record import check_run_folder, find_start, record_start
from yrunner.assembly.replay import check_keep_file, prepare_keep
from yrunner.assembly.report import (
    model_card,
    record_result,
    say_next,
    say_plan,
    say_result,
    write_run_report,
)
from yrunner.assembly.run import Run
from yrunner.assembly.sharing import (
    check_sharing,
    init_process_group,
    is_launched,
    keeps_run_folder,
    launch,
    ranks_to_launch,
    say_launch,
    this_process,
    updates_shared,
)
from yrunner.assembly.trainer import (
    mixed_precision,
    run_trainer,
    save_result,
    train_to_the_end,
    training_arguments,
    untrained_model,
)
from yrunner.console import say, warn
from yrunner.distributed.collectives import (
    gather_over_ranks,
    leave_ranks,
    this_rank,
    wait_for_ranks,
)
from yrunner.storage.run_lock import run_lock
from yrunner.training.callbacks import explaining_how_to_resume
from yrunner.training.loop import Trainer


def train(
    path: Path,
    overrides: list[str],
    *,
    sort: Sorter | None = None,
    print_launch: bool = False,
    **options: bool,
) -> None:
    """Train the recipe at `path`, after its base and sorted rows if they are missing or changed.

    `options`: `resume`, `overwrite` and `is_base` of `RunOptions`. `sort`: see `prepare`.
    `print_launch`: only print the command that launches its ranks.
    """
    run = Run.load(path, overrides, **options)
    if print_launch:
        say_launch(run)
    else:
        train_run(run, sort)


def train_run(run: Run, sort: Sorter | None = None) -> None:
    """Train one recipe; see `train`."""
    topology = ranks_to_launch(run.recipe)
    is_keeper = keeps_run_folder(topology)
    # Launched ranks run under the lock of the command that launched them.
    with run_lock(run.folder.folder) if is_keeper and not is_launched() else nullcontext():
        resumes = run.options.resume
        if resumes and not is_launched():
            sort_rows(run, sort)  # without its rows it is another run
        if is_keeper:
            check_run_folder(run)
        if run.options.resume and run.folder.is_finished():
            _say_finished(run)
            return
        check_needs(run)
        run.check_questions()
        if run.options.resume:
            step = find_start(run.folder)
            run.options = replace(
                run.options, resume=step is not None, overwrite=step is None, from_step=step
            )
        if topology is not None:
            check_sharing(run, topology)
        if not is_launched():
            if not resumes:
                sort_rows(run, sort)
            train_base(run, sort)
            train_teacher(run, sort)
            for judge, reason in run.untrained_judges:
                _train_other(run, judge, reason, sort)
        if topology is None:
            _train_here(run)
        else:
            launch(run, topology)


def prepare(run: Run, sort: Sorter | None = None) -> None:
    """Make what a run starts from: its sorted rows and its base, if missing or changed.

    Rows are sorted by `sort`; without it, rows that are not sorted are an error.
    """
    sort_rows(run, sort)
    train_base(run, sort)


def train_base(run: Run, sort: Sorter | None = None) -> None:
    """Train the base of a run if that is a recipe without a result or has changed."""
    _train_other(run, run.untrained_base, run.stale_base, sort)


def train_teacher(run: Run, sort: Sorter | None = None) -> None:
    """Train the teacher of a run, as `train_base` does with its base."""
    if run.untrained_teacher is not None:
        check_fit(run)  # a teacher with another tokenizer would be trained in vain
    _train_other(run, run.untrained_teacher, run.stale_teacher, sort)


def _train_other(run: Run, other: Run | None, reason: str | None, sort: Sorter | None) -> None:
    if other is None:
        return
    # Training it takes long: check first what could fail afterwards.
    run.refuse_unreadable_rows()
    say(str(reason))
    resumes = other.can_resume()
    other.options = replace(other.options, resume=resumes, overwrite=not resumes)
    train_run(other, sort)
    run.forget_base()


def _train_here(run: Run) -> None:
    """Train in this process. Nothing is written before rows and disk space are checked."""
    run.accept_rows()
    check_fit(run)
    check_keep_file(run)
    process = this_process()
    shared = updates_shared(run, process.num_ranks)
    plan = run.plan(num_ranks=shared.started_by)
    # Before the process group is initialised: waiting in it can time out.
    regulariser_data, reference = prepare_keep(run), prepare_reference(run)
    teaching = prepare_teacher(run)
    deepspeed = init_process_group(run.recipe)
    # Before the model: under DeepSpeed ZeRO-3 the arguments decide how weights load.
    arguments = training_arguments(run, plan, shared.micro_steps, deepspeed)
    teaching = teaching or load_teacher(run)
    model = untrained_model(run)
    if process.rank == 0:
        findings = [*findings_of_recipe(run.recipe), *findings_of_base(run, model)]
        for finding in (*findings, *findings_of_export(run)):
            warn(finding)
        check_disk(run, model, plan)
        record_start(run, plan, process.num_ranks)
        record_rows(run, regulariser_data)
        record_teacher(run)
    # The fingerprint must be of the files as they were read.
    run.refuse_changed_files()
    wait_for_ranks()
    say_plan(run, model, plan)
    with explaining_how_to_resume(run.options.how_to_resume):
        trainer = run_trainer(run, model, plan, arguments, reference, teaching)
        with explaining_stops(trainer, run):
            with mixed_precision(trainer, run.dtype):
                add_regulariser(trainer, run, regulariser_data)
            _measure_and_train(trainer, run)
    leave_ranks(together=True)


def _measure_and_train(trainer: Trainer, run: Run) -> None:
    """Measure, train, measure again, and write the result."""
    is_writer = this_rank() == 0

    def before_training() -> None:
        with mixed_precision(trainer, run.dtype):
            measured = measure_before(run, trainer.model, trainer.plan)
        if is_writer:
            measured.save(run.folder.before)

    if run.options.from_step is None:
        trainer.when_model_runs(before_training)
    train_to_the_end(trainer, run)
    # The other processes may be on machines that do not have the file.
    before = gather_over_ranks(Measured.load(run.folder.before) if is_writer else None)[0]
    with mixed_precision(trainer, run.dtype):
        after = measure_after(run, trainer.model, before)
    weights = None if trainer.zero is None else trainer.zero.whole_weights()
    if is_writer:
        after.save(run.folder.after)
        record_result(run, trainer.result_step, trainer.state.global_step)
        save_result(trainer, run, model_card(run, before, after), weights)
        write_run_report(run, before, after)
        say_result(run, before, after)
        if not run.options.is_base:
            say_next(run)


def _say_finished(run: Run) -> None:
    """Write the report if the process was killed after saving the model."""
    if not run.folder.report.exists():
        measured = [Measured.load(path) for path in (run.folder.before, run.folder.after)]
        write_run_report(run, *measured)
    say(f"{run.recipe.name} is finished: {run.folder.model}")
