"""What the arms of an experiment will do, told before they run, and where they differ unasked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from yrunner.assembly.run import Run
from yrunner.data.batching.plan import Plan
from yrunner.data.batching.token_batches import count_targets
from yrunner.storage.run_dir import RunDir, read_json
from yrunner.training.callbacks import checkpoint_is_due


@dataclass(frozen=True)
class PlanFacts:
    """What a run learns from, known exactly before it."""

    updates: int
    targets: int
    """Targets seen, each as often as it is learned from."""
    rows: int
    """Different examples."""
    order: str
    """A hash of the order in which the examples are begun."""
    base: str
    """The model that it starts from, as the recipe names it."""


def plan_facts(run: Run) -> PlanFacts:
    """Plan a run as `yrun train` would. Raises `DataError` where that would refuse the data."""
    run.refuse_faulty_rows()
    plan, examples = run.plan(), run.dataset.train
    targets, order = _walk(plan, np.asarray(examples.num_targets).tolist())
    return PlanFacts(
        updates=plan.num_updates,
        targets=targets,
        rows=len(examples),
        order=order,
        base=str(run.recipe.model.base),
    )


def due_checkpoints(run: Run, saved: Sequence[int]) -> list[int]:
    """Of the updates after which a finished run was saved, those that the recipe asks for.

    An interruption leaves a checkpoint wherever it comes; a run must not be looked at more often
    for having been interrupted.
    """
    run.refuse_faulty_rows()
    plan = run.plan()
    every = run.recipe.train.checkpoint.every
    return [
        step
        for step in saved
        if step == saved[-1] or checkpoint_is_due(step, every, plan.epoch_ends)
    ]


def fairness_notes(facts: Mapping[str, PlanFacts]) -> list[str]:
    """Where an arm differs from the first in more than the keys that it changes; none is an error.

    `facts` are those of each arm with the same seed, by the arm's name.
    """
    first_name, first = next(iter(facts.items()))
    notes = []
    for name, arm in facts.items():
        differing = []
        if arm.updates != first.updates:
            differing.append(f"{arm.updates:,} updates instead of {first.updates:,}")
        if arm.targets != first.targets:
            differing.append(f"{arm.targets:,} targets seen instead of {first.targets:,}")
        if arm.rows != first.rows:
            differing.append(f"{arm.rows:,} different rows instead of {first.rows:,}")
        if arm.order != first.order:
            differing.append("its rows in another order")
        if arm.base != first.base:
            differing.append("another base")
        if differing:
            notes.append(f"{name} has, beside {first_name}, {'; '.join(differing)}")
    return notes


def environment_notes(run_dirs: Mapping[str, RunDir]) -> list[str]:
    """What the machines of finished runs do not have in common: versions, commit, device."""
    known = {name: read_json(run_dir.environment) for name, run_dir in run_dirs.items()}
    notes = []
    for key in ("versions", "commit", "device"):
        values: dict[str, list[str]] = {}
        for name, environment in known.items():
            values.setdefault(str(environment[key]), []).append(name)
        if len(values) > 1:
            groups = "; ".join(f"{value}: {', '.join(names)}" for value, names in values.items())
            notes.append(f"the runs were not made alike, {key} differ: {groups}")
    return notes


def _walk(plan: Plan, num_targets: list[int]) -> tuple[int, str]:
    """Targets that the run learns from, and a hash of the order in which it begins examples."""
    targets, order = 0, sha256()
    for update in plan.updates():
        for row in update:
            for example, group in row:
                targets += count_targets(num_targets[example], group, plan.token_batch)
                if group == 0:
                    order.update(f"{example} ".encode())
    return targets, order.hexdigest()
