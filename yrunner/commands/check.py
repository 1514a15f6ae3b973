"""`yrun check`: everything that can be known of a run before it starts. Trains nothing."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yrunner.commands.check_advice import advise
from yrunner.commands.check_facts import (
    DataFacts,
    Schedule,
    Steps,
    count_steps,
    data_facts,
    largest_micro_batch,
    schedule,
)
from yrunner.commands.check_machine import choose_machine, count_ranks
from yrunner.commands.check_memory import Estimator, MemoryFacts, estimate_memory
from yrunner.commands.check_model import check_model, missing_weights
from yrunner.commands.check_sample import NotScored, score_sample
from yrunner.commands.check_signal import Signal, describe_sample
from yrunner.commands.check_signal_story import print_signal, write_signal_page
from yrunner.commands.check_story import (
    print_data,
    print_disk,
    print_memory,
    print_schedule,
    print_steps,
    print_unread,
)
from yrunner.commands.disk_space import DiskFacts, lack_of_space
from yrunner.commands.keep_data import check_keep_file
from yrunner.commands.measure import read_tasks
from yrunner.commands.row_fit import check_fit
from yrunner.commands.tokenizer import recipe_tokenizer
from yrunner.commands.train_data import finish_data, print_left_out, print_rows, read_data
from yrunner.commands.train_plan import plan_run
from yrunner.commands.weight_curves import zone_edges
from yrunner.console import say
from yrunner.data.plan import Plan
from yrunner.data.prepared import Prepared
from yrunner.data.report import as_json
from yrunner.errors import DataError, YRunnerError
from yrunner.recipe.load import load_recipe
from yrunner.recipe.schema import Recipe
from yrunner.run_dir import RunDir, page_beside
from yrunner.training.trackers import check_trackers


@dataclass(frozen=True)
class Facts:
    """What is known of a run that has something to learn from."""

    data: DataFacts
    steps: Steps
    schedule: Schedule
    memory: MemoryFacts
    advice: list[str]
    """What to change where the recipe's tuning does not fit."""
    disk: DiskFacts | None


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
) -> None:
    """Check the recipe at `path`, print what its run would be, and refuse what that would refuse.

    `as_machine`: print one JSON object instead of tables. `sample`: rows to score with the base,
    0 for none, None for as many as make sense. `as_page`: write the curve of the weight to `page`;
    None puts it beside the run folder. `gpus`, `memory`: the machine to plan for, such as 8 of
    "80GB"; default this one. Raises what `yrun train` would raise for the recipe, its files, its
    rows and missing weights, after everything else was said.
    """
    recipe = load_recipe(path, overrides)
    num_ranks = count_ranks(recipe.distributed, gpus)
    machine = choose_machine(gpus, memory, num_ranks)
    page = page_beside(recipe.run_folder, "check", page) if as_page else None
    check_trackers(recipe.train.trackers)
    read_tasks(recipe)
    tokenizer = recipe_tokenizer(recipe)
    open_question = check_model(recipe, tokenizer)
    prepared = read_data(recipe, tokenizer)
    check_keep_file(recipe, tokenizer)
    refusal = _refusal(recipe, tokenizer, prepared) or missing_weights(recipe)
    facts = None
    if len(prepared.train):
        estimator = Estimator(recipe, tokenizer, machine)
        facts = _gather(estimator, prepared, plan_run(recipe, prepared, num_ranks=num_ranks))
    if refusal is None and facts is not None and facts.disk is not None:
        refusal = lack_of_space(recipe, facts.disk)
    if not as_machine:
        _print(recipe, prepared, facts)
    signal = _measure_signal(recipe, tokenizer, prepared, sample, page)
    if as_machine:
        content = _as_json(recipe, prepared, facts, signal, refusal)
        say(json.dumps(content, ensure_ascii=False, indent=2))
    else:
        print_signal(recipe, signal)
        if page is not None:
            say(f"page: {page}" if isinstance(signal, Signal) else "page: there is nothing to draw")
    if refusal is not None:
        raise refusal
    if not as_machine:
        _say_verdict(recipe, open_question)


def _refusal(recipe: Recipe, tokenizer: Any, prepared: Prepared) -> YRunnerError | None:
    """Why training would refuse the data; the validation rows are set aside where it would not."""
    try:
        finish_data(recipe, prepared)
        check_fit(recipe, tokenizer, prepared)
    except YRunnerError as error:
        return error
    return None


def _gather(estimator: Estimator, prepared: Prepared, plan: Plan) -> Facts:
    recipe = estimator.recipe
    batch = largest_micro_batch(recipe, prepared, plan)
    memory, disk = estimate_memory(estimator, batch, plan)
    return Facts(
        data_facts(prepared),
        count_steps(recipe, prepared, plan),
        schedule(recipe.train, plan.num_updates),
        memory,
        advise(estimator, batch, memory.lines),
        disk,
    )


def _measure_signal(
    recipe: Recipe, tokenizer: Any, prepared: Prepared, rows: int | None, page: Path | None
) -> Signal | NotScored:
    try:
        sample = score_sample(recipe, tokenizer, prepared.train, rows)
    except DataError as error:
        # A row that the base cannot read: `_refusal` has found it, too.
        return NotScored(error.message)
    if isinstance(sample, NotScored):
        return sample
    signal = describe_sample(sample, zone_edges(recipe.loss))
    if page is not None:
        write_signal_page(recipe, sample, signal, page)
    return signal


def _print(recipe: Recipe, prepared: Prepared, facts: Facts | None) -> None:
    print_rows(recipe, prepared)
    print_left_out(prepared)
    print_unread(prepared.reports)
    if facts is None:
        return
    print_data(facts.data)
    print_steps(facts.steps, "packed rows" if recipe.data.packing else "examples")
    print_schedule(facts.schedule)
    print_memory(facts.memory, facts.advice)
    if facts.disk is not None:
        print_disk(facts.disk)


def _as_json(
    recipe: Recipe,
    prepared: Prepared,
    facts: Facts | None,
    signal: Signal | NotScored,
    refusal: YRunnerError | None,
) -> dict[str, Any]:
    return {
        "recipe": recipe.name,
        "refused": None if refusal is None else str(refusal),
        "rows": as_json(prepared.reports, prepared.findings),
        **(asdict(facts) if facts else {}),
        "signal": asdict(signal),
    }


def _say_verdict(recipe: Recipe, open_question: str | None) -> None:
    say("")
    if open_question is not None:
        say(open_question)
    if RunDir(recipe.run_folder).is_used():
        say(f"{recipe.run_folder} already holds a run: train with --resume or --overwrite")
    say(f"{recipe.name}: nothing stands in the way of training")
