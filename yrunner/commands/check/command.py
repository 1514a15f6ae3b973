"""`yrun check`: report everything that is known about a run before it starts. Trains nothing."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from yrunner.assembly.dataset import print_left_out, print_rows, unit_of
from yrunner.assembly.distillation.teacher import TeacherFacts
from yrunner.assembly.memory import (
    Estimator,
    Machine,
    MemoryFacts,
    MemoryLine,
    choose_machine,
    count_ranks,
    estimate_memory,
    lines_of,
    variants,
)
from yrunner.assembly.preflight import (
    DiskFacts,
    check_fit,
    check_needs,
    findings_of_export,
    findings_of_recipe,
    lack_of_space,
    say_sorted_rows,
)
from yrunner.assembly.replay import check_keep_file, writing_note
from yrunner.assembly.run import Run
from yrunner.assembly.sharing import check_ranks
from yrunner.assembly.trainer import critic_in_words, reference_in_words
from yrunner.commands.check.facts import (
    DataFacts,
    ModelFacts,
    Schedule,
    Steps,
    check_model,
    check_weights,
    count_steps,
    data_facts,
    largest_micro_batch,
    schedule,
)
from yrunner.commands.check.report import (
    print_data,
    print_disk,
    print_memory,
    print_schedule,
    print_signal,
    print_steps,
    write_signal_page,
)
from yrunner.commands.check.rollouts import RolloutFacts, measure_rollouts, print_rollouts
from yrunner.commands.check.signal import NotScored, Signal, describe_sample, score_sample
from yrunner.console import say, waiting, warn
from yrunner.data.batching.plan import Plan
from yrunner.data.conversation import TokenizedExample
from yrunner.errors import DataError, YRunnerError
from yrunner.losses.nlirg import zone_edges
from yrunner.storage.run_dir import page_beside
from yrunner.training.arguments import token_weight
from yrunner.training.memory.trace import Untraceable
from yrunner.training.trackers import check_trackers

MOST_GPUS = 512
GPU_SIZES = (16, 24, 32, 48, 80, 96, 141, 192, 288)
"""Gigabytes of common GPUs."""

Sampled = Signal | RolloutFacts | NotScored | None
"""What the base says about a few rows."""


@dataclass(frozen=True)
class Facts:
    """Everything known about a run with training rows."""

    data: DataFacts
    steps: Steps
    schedule: Schedule
    memory: MemoryFacts
    advice: list[str]
    """What to change if the recipe does not fit."""
    disk: DiskFacts | None
    teacher: TeacherFacts | None


def check(
    path: Path,
    overrides: list[str],
    *,
    as_machine: bool,
    sample: int | None = None,
    as_page: bool = False,
    page: Path | None = None,
    gpus: int | None = None,
    memory: str | None = None,
    trust_code: bool = False,
) -> None:
    """Check the recipe at `path` and print the facts of its run.

    `as_machine`: print one JSON object instead of tables. `sample`: rows to score with the base,
    0 for none, None for a sensible number. `as_page`: write the weight curve to `page`; None puts
    it beside the run folder. `gpus`, `memory`: the machine to plan for, such as 8 of "80GB";
    default this one. Finally raises what `yrun train` would raise for the recipe, its files, its
    rows and missing weights.
    """
    run = Run.load(path, overrides, trust_code=trust_code)
    recipe = run.recipe
    num_ranks = count_ranks(recipe.distributed, gpus)
    machine = choose_machine(gpus, memory, num_ranks)
    page = page_beside(recipe.run_folder, "check", page) if as_page else None
    run.folder.check(run.folder.checkpoints)
    check_trackers(recipe.train.trackers)
    run.check_questions()
    prepared = run.dataset
    with waiting("trying the model"):
        model = check_model(run)
    check_keep_file(run)
    is_for_here = gpus is None and memory is None
    lack = _first_error(check_needs, check_ranks, run=run) if is_for_here else None
    fault = _first_error(Run.refuse_faulty_rows, check_fit, check_weights, run=run)
    refusal = lack or fault
    facts = plan = None
    if len(prepared.train):
        plan = run.plan(num_ranks=num_ranks)
        with waiting("estimating memory"):
            facts = _gather(Estimator(run, machine), plan, compares=not is_for_here)
    if refusal is None and facts is not None and facts.disk is not None:
        refusal = lack_of_space(run, facts.disk)
    if not as_machine:
        _print(run, facts)
    if recipe.train.stage != "rl":
        signal: Sampled = _measure_signal(run, sample, page, model.base)
    else:
        signal, failure = _measure_rollouts(run, None if refusal else plan, sample, num_ranks)
        refusal = refusal or failure
    if as_machine:
        content = _as_json(run, model, facts, signal, refusal)
        say(json.dumps(content, ensure_ascii=False, indent=2))
    else:
        _print_sample(run, signal, page)
    if refusal is not None:
        raise refusal
    if not as_machine:
        _say_verdict(run, model)


def _measure_rollouts(
    run: Run, plan: Plan | None, prompts: int | None, num_ranks: int
) -> tuple[RolloutFacts | NotScored | None, YRunnerError | None]:
    """What the rewards say of the base's answers, or the error of a reward."""
    if plan is None:
        return None, None
    try:
        return measure_rollouts(run, plan, prompts, num_ranks), None
    except YRunnerError as error:
        return None, error


def _print_sample(run: Run, signal: Sampled, page: Path | None) -> None:
    if isinstance(signal, (Signal, NotScored)):
        print_signal(run.recipe, signal)
    elif signal is not None:
        print_rollouts(signal)
    if page is not None:
        say(f"page: {page}" if isinstance(signal, Signal) else "page: nothing to draw")


def _first_error(*checks: Callable[[Run], None], run: Run) -> YRunnerError | None:
    """The first error of these checks; None if there is none."""
    for check_one in checks:
        try:
            check_one(run)
        except YRunnerError as error:
            return error
    return None


def _gather(estimator: Estimator, plan: Plan, *, compares: bool) -> Facts:
    run = estimator.run
    batch = largest_micro_batch(run, plan)
    memory, disk = estimate_memory(estimator, batch, plan, compares=compares)
    return Facts(
        data_facts(run.dataset),
        count_steps(run, plan),
        schedule(run.recipe.train, plan.num_updates),
        memory,
        advise(estimator, batch, memory.lines),
        disk,
        estimator.teacher,
    )


def _measure_signal(
    run: Run, rows: int | None, page: Path | None, tuned: Any
) -> Signal | NotScored:
    try:
        sample = score_sample(run, run.dataset.train, rows, tuned)
    except DataError as error:
        # A row that the base cannot read: `check_fit` finds it too.
        return NotScored(error.message)
    if isinstance(sample, NotScored):
        return sample
    signal = describe_sample(sample, zone_edges(token_weight(run.recipe.token_loss)[1]))
    if page is not None:
        write_signal_page(run.recipe, sample, signal, page)
    return signal


def _print(run: Run, facts: Facts | None) -> None:
    prepared = run.dataset
    for sorting in run.sorts:
        why = sorting.stale_sort()
        if why is None:
            say_sorted_rows(run, sorting)
        else:
            say(f"{why.partition(':')[0]}: yrun train sorts them first, and may drop some of these")
    print_rows(prepared, run.folder.prepared)
    print_left_out(prepared)
    if facts is None:
        return
    print_data(facts.data)
    print_steps(facts.steps, unit_of(run.recipe))
    if (note := writing_note(run.recipe)) is not None:
        say(note)
    if (reference := reference_in_words(run.recipe)) is not None:
        say(f"reference: {reference}")
    if (critic := critic_in_words(run.recipe)) is not None:
        say(f"critic: {critic}")
    if facts.teacher is not None:
        say(facts.teacher.sentence)
    print_schedule(facts.schedule)
    print_memory(facts.memory, facts.advice)
    if facts.disk is not None:
        print_disk(facts.disk)


def _as_json(
    run: Run,
    model: ModelFacts,
    facts: Facts | None,
    signal: Sampled,
    refusal: YRunnerError | None,
) -> dict[str, Any]:
    prepared = run.dataset
    return {
        "recipe": run.recipe.name,
        "refused": None if refusal is None else str(refusal),
        "rows": prepared.as_json(),
        "to_sort": [why for sorting in run.sorts if (why := sorting.stale_sort()) is not None],
        "base": {"findings": _findings(run, model)},
        "reference": reference_in_words(run.recipe),
        "critic": critic_in_words(run.recipe),
        **(asdict(facts) if facts else {}),
        "rollouts" if run.recipe.train.stage == "rl" else "signal": (
            None if signal is None else asdict(signal)
        ),
    }


def _findings(run: Run, model: ModelFacts) -> list[str]:
    return [*findings_of_recipe(run.recipe), *model.findings, *findings_of_export(run)]


def _say_verdict(run: Run, model: ModelFacts) -> None:
    say("")
    for finding in _findings(run, model):
        warn(finding)
    if model.unchecked is not None:
        say(model.unchecked)
    if run.folder.is_used():
        say(f"{run.folder.folder} already has a run: train with --resume or --overwrite")
    say(f"{run.recipe.name}: ready to train")


def advise(
    estimator: Estimator, micro_batch: Sequence[TokenizedExample], lines: Sequence[MemoryLine]
) -> list[str]:
    """Changes that would make the recipe fit, each one estimated; none if it already fits."""
    kind = estimator.recipe.tuning.kind
    own = [line for line in lines if line.tuning == kind]
    if not own or any(line.fits for line in own):
        return []
    proposals = [
        *_other_kinds(kind, lines),
        *_other_keys(estimator, micro_batch),
        *_other_machines(estimator, micro_batch),
    ]
    return proposals or ["choose a smaller model, or a smaller data.max_length"]


def _other_kinds(own: str, lines: Sequence[MemoryLine]) -> Iterator[str]:
    for kind in dict.fromkeys(line.tuning for line in lines if line.tuning != own):
        line = next((it for it in lines if it.tuning == kind and it.fits), None)
        if line is not None:
            yield _proposal(f"tuning.kind={kind}", line)


def _other_keys(estimator: Estimator, micro_batch: Sequence[TokenizedExample]) -> Iterator[str]:
    run = estimator.run
    for variant in variants(run.recipe, micro_batch, estimator.dtype_of(run.recipe.tuning)):
        if variant.recipe.tuning.kind != run.recipe.tuning.kind:
            continue
        changed = Estimator(run.variant(variant.recipe), estimator.machine)
        line = _first_that_fits(changed, variant.micro_batch, estimator.machine)
        if line is not None:
            yield _proposal(variant.change, line)


def _other_machines(estimator: Estimator, micro_batch: Sequence[TokenizedExample]) -> Iterator[str]:
    """More GPUs of this size, or larger ones."""
    machine = estimator.machine
    if machine.is_cpu:
        return
    gpus = machine.gpus
    while gpus < MOST_GPUS:
        gpus *= 2
        more = replace(machine, gpus=gpus, host=None)
        line = _first_that_fits(estimator, micro_batch, more)
        if line is not None:
            yield _proposal(f"{gpus} of these GPUs", line)
            break
    for size in GPU_SIZES:
        larger = replace(machine, memory=size * 10**9)
        line = _first_that_fits(estimator, micro_batch, larger)
        if larger.memory > machine.memory and line is not None:
            yield _proposal(f"{larger}", line)
            return


def _first_that_fits(
    estimator: Estimator, micro_batch: Sequence[TokenizedExample], machine: Machine
) -> MemoryLine | None:
    recipe = estimator.recipe
    found = estimator.estimate(
        recipe.tuning, micro_batch, recomputes=recipe.train.gradient_checkpointing
    )
    if isinstance(found, Untraceable):
        return None
    lines = lines_of(recipe.tuning.kind, found.workload, machine, beside=estimator.beside)
    return next((line for line in lines if line.fits), None)


def _proposal(change: str, line: MemoryLine) -> str:
    return f"{change} ({line.layout}: {line.peak / 1e9:.1f} GB)"
