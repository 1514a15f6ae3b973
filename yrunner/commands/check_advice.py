"""What to change where a run does not fit: every proposal has been estimated, and fits."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from yrunner.commands.check_machine import Machine
from yrunner.commands.check_memory import Estimator, MemoryLine, lines_of
from yrunner.commands.memory_advice import variants
from yrunner.data.conversation import TokenizedExample
from yrunner.training.memory import Untraceable

MOST_GPUS = 512
GPU_SIZES = (16, 24, 32, 48, 80, 96, 141, 192, 288)
"""Gigabytes of the GPUs that can be bought or rented."""


def advise(
    estimator: Estimator, micro_batch: Sequence[TokenizedExample], lines: Sequence[MemoryLine]
) -> list[str]:
    """Changes after which the recipe's tuning would fit, or another one; none where it does."""
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
            yield _say(f"tuning.kind={kind}", line)


def _other_keys(estimator: Estimator, micro_batch: Sequence[TokenizedExample]) -> Iterator[str]:
    for variant in variants(estimator.recipe, micro_batch):
        if variant.recipe.tuning.kind != estimator.recipe.tuning.kind:
            continue
        changed = Estimator(variant.recipe, estimator.tokenizer, estimator.machine)
        line = _first_that_fits(changed, variant.micro_batch, estimator.machine)
        if line is not None:
            yield _say(variant.change, line)


def _other_machines(estimator: Estimator, micro_batch: Sequence[TokenizedExample]) -> Iterator[str]:
    """More GPUs like these, or larger ones."""
    machine = estimator.machine
    if machine.is_cpu:
        return
    gpus = machine.gpus
    while gpus < MOST_GPUS:
        gpus *= 2
        more = replace(machine, gpus=gpus, host=None)
        line = _first_that_fits(estimator, micro_batch, more)
        if line is not None:
            yield _say(f"{gpus} such GPUs", line)
            break
    for size in GPU_SIZES:
        larger = replace(machine, memory=size * 10**9)
        line = _first_that_fits(estimator, micro_batch, larger)
        if larger.memory > machine.memory and line is not None:
            yield _say(f"{larger}", line)
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
    lines = lines_of(recipe.tuning.kind, found.job, machine)
    return next((line for line in lines if line.fits), None)


def _say(change: str, line: MemoryLine) -> str:
    return f"{change} ({line.layout}: {line.peak / 1e9:.1f} GB)"
