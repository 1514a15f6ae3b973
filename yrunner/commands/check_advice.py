"""What to change where a run does not fit: every proposal has been estimated, and fits."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from yrunner.commands.check_machine import Machine
from yrunner.commands.check_memory import Estimator, MemoryLine, lines_of
from yrunner.data.conversation import TokenizedExample
from yrunner.recipe.schema import Recipe
from yrunner.training.memory import Untraceable
from yrunner.training.sharing import Job

MOST_GPUS = 512
GPU_SIZES = (16, 24, 32, 48, 80, 96, 141, 192, 288)
"""Gigabytes of the GPUs that can be bought or rented."""


def advise(
    recipe: Recipe,
    estimator: Estimator,
    micro_batch: Sequence[TokenizedExample],
    lines: Sequence[MemoryLine],
) -> list[str]:
    """Changes after which the recipe's tuning would fit, or another one; none where it does."""
    own = [line for line in lines if line.tuning == recipe.tuning.kind]
    if not own or any(line.fits for line in own):
        return []
    proposals = [
        *_other_kinds(recipe, lines),
        *_smaller_updates(recipe, estimator, micro_batch),
        *_other_machines(recipe, estimator, micro_batch),
    ]
    return proposals or ["choose a smaller model, or a smaller data.max_length"]


def _other_kinds(recipe: Recipe, lines: Sequence[MemoryLine]) -> Iterator[str]:
    kinds = dict.fromkeys(line.tuning for line in lines if line.tuning != recipe.tuning.kind)
    for kind in kinds:
        line = next((it for it in lines if it.tuning == kind and it.fits), None)
        if line is not None:
            yield _say(f"tuning.kind={kind}", line)


def _smaller_updates(
    recipe: Recipe, estimator: Estimator, micro_batch: Sequence[TokenizedExample]
) -> Iterator[str]:
    """Fewer activations at a time: computed twice, and from one row. Neither changes a result."""
    train = recipe.train
    rows = train.batch_size * train.gradient_accumulation_steps
    one_row = f"train.batch_size=1 train.gradient_accumulation_steps={rows}"
    twice = "train.gradient_checkpointing=true"
    changes = [(twice, micro_batch, True)] if not train.gradient_checkpointing else []
    if train.batch_size > 1:
        row = first_row(micro_batch, recipe.data.max_length if recipe.data.packing else 0)
        changes.append((one_row, row, train.gradient_checkpointing))
        changes.append((f"{twice} {one_row}", row, True))
    for change, batch, recomputes in changes:
        found = estimator.estimate(recipe.tuning, batch, recomputes=recomputes)
        if isinstance(found, Untraceable):
            continue
        line = _first_that_fits(recipe, found.job, estimator.machine)
        if line is not None:
            yield _say(change, line)
            return


def _other_machines(
    recipe: Recipe, estimator: Estimator, micro_batch: Sequence[TokenizedExample]
) -> Iterator[str]:
    """More GPUs like these, or larger ones."""
    train = recipe.train
    found = estimator.estimate(recipe.tuning, micro_batch, recomputes=train.gradient_checkpointing)
    machine = estimator.machine
    if isinstance(found, Untraceable) or machine.is_cpu:
        return
    gpus = machine.gpus
    while gpus < MOST_GPUS:
        gpus *= 2
        line = _first_that_fits(recipe, found.job, replace(machine, gpus=gpus, host=None))
        if line is not None:
            yield _say(f"{gpus} such GPUs", line)
            break
    for size in GPU_SIZES:
        larger = replace(machine, memory=size * 10**9)
        line = _first_that_fits(recipe, found.job, larger)
        if size * 10**9 > machine.memory and line is not None:
            yield _say(f"{larger}", line)
            return


def _first_that_fits(recipe: Recipe, job: Job, machine: Machine) -> MemoryLine | None:
    lines = lines_of(recipe.tuning.kind, job, machine, is_own=True)
    return next((line for line in lines if line.fits), None)


def first_row(micro_batch: Sequence[TokenizedExample], packed_to: int) -> list[TokenizedExample]:
    """The longest examples that fill one row of `packed_to` tokens; 0: the longest alone."""
    longest_first = sorted(micro_batch, key=lambda it: len(it.input_ids), reverse=True)
    row = longest_first[:1]
    space = packed_to - len(row[0].input_ids)
    for example in longest_first[1:]:
        if len(example.input_ids) <= space:
            row.append(example)
            space -= len(example.input_ids)
    return row


def _say(change: str, line: MemoryLine) -> str:
    return f"{change} ({line.layout}: {line.peak / 1e9:.1f} GB)"
