"""The plan of each arm before it runs, and unintended differences between arms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from yrunner.assembly.run import Run
from yrunner.console import counted
from yrunner.data.batching.plan import Plan
from yrunner.data.batching.token_batches import count_targets
from yrunner.storage.run_dir import RunDir, read_json
from yrunner.training.callbacks import checkpoint_is_due


@dataclass(frozen=True)
class PlanFacts:
    """What a run trains on, known exactly in advance."""

    updates: int
    targets: int
    """Targets seen, counted each time; for `train.stage: rl` answers, whose length is not known."""
    rows: int
    """Different examples."""
    order: str
    """A hash of the order in which the examples come up."""
    base: str
    """The base, as the recipe names it."""
    unit: str = "targets"
    """What `targets` counts."""


def plan_facts(run: Run) -> PlanFacts:
    """Plan a run as `yrun train` would. Raises `DataError` if that would refuse the data."""
    run.refuse_faulty_rows()
    plan, examples = run.plan(), run.dataset.train
    writes = run.recipe.train.stage == "rl"
    num_targets = [1] * len(examples) if writes else np.asarray(examples.num_targets).tolist()
    targets, order = _walk(plan, num_targets)
    return PlanFacts(
        updates=plan.num_updates,
        targets=targets,
        rows=len(examples),
        order=order,
        base=str(run.recipe.model.base),
        unit="answers" if writes else "targets",
    )


def due_checkpoints(run: Run, saved: Sequence[int]) -> list[int]:
    """The saved updates of a finished run that its recipe saves on schedule.

    An interruption saves an extra checkpoint; it must not add a measurement.
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
    """How arms differ from the first beyond the keys that they change; none is an error.

    `facts` are those of each arm with the same seed, by the arm's name.
    """
    first_name, first = next(iter(facts.items()))
    notes = []
    for name, arm in facts.items():
        differing = []
        if arm.updates != first.updates:
            differing.append(f"{counted(arm.updates, 'update')} instead of {first.updates:,}")
        if arm.targets != first.targets:
            differing.append(f"{arm.targets:,} {arm.unit} seen instead of {first.targets:,}")
        if arm.rows != first.rows:
            differing.append(f"{counted(arm.rows, 'different row')} instead of {first.rows:,}")
        if arm.order != first.order:
            differing.append("another row order")
        if arm.base != first.base:
            differing.append("another base")
        if differing:
            notes.append(f"compared with {first_name}, {name} has {'; '.join(differing)}")
    return notes


def environment_notes(run_dirs: Mapping[str, RunDir]) -> list[str]:
    """How the environments of finished runs differ: versions, commit, device, precision."""
    known = {name: read_json(run_dir.environment) for name, run_dir in run_dirs.items()}
    notes = []
    for key in ("versions", "commit", "device", "dtype"):
        values: dict[str, list[str]] = {}
        for name, environment in known.items():
            if key in environment:  # not every version has written the dtype
                values.setdefault(str(environment[key]), []).append(name)
        if len(values) > 1:
            groups = "; ".join(f"{value}: {', '.join(names)}" for value, names in values.items())
            notes.append(f"the runs have different {key}: {groups}")
    return notes


def _walk(plan: Plan, num_targets: list[int]) -> tuple[int, str]:
    """The number of targets seen, and a hash of the order of the examples."""
    targets, order = 0, sha256()
    for update in plan.updates():
        for row in update:
            for example, group in row:
                row_targets = num_targets[plan.data_row(example)]
                targets += count_targets(row_targets, group, plan.token_batch)
                if group == 0:
                    order.update(f"{example} ".encode())
    return targets, order.hexdigest()
