"""What a run writes against what is free, before it starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yrunner.console import as_gigabytes
from yrunner.data.plan import Plan
from yrunner.errors import RunError
from yrunner.models.disk import DiskNeed, estimate_disk
from yrunner.recipe.schema import Recipe
from yrunner.run_dir import RunDir, free_bytes
from yrunner.training.cadence import count_checkpoints
from yrunner.training.memory import optimizer_bytes


@dataclass(frozen=True)
class DiskFacts:
    """What the run writes, in bytes."""

    checkpoint: int
    num_checkpoints: int
    """That stand there at the fullest moment."""
    model: int
    needed: int
    """At the fullest moment."""
    free: int
    """What an earlier run has left in the folder is counted as free: it is replaced bit by bit."""


def disk_facts(recipe: Recipe, need: DiskNeed, plan: Plan) -> DiskFacts:
    """The need of a recipe's run, beside what is free where it writes."""
    validates = bool(recipe.data.validation) or recipe.data.validation_share is not None
    section = recipe.train.checkpoint
    # Beside the newest there is the best one by validation; one is written before another goes.
    written = count_checkpoints(plan.num_updates, section.every, plan.epoch_ends)
    number = min(section.keep + validates + 1, written)
    run_dir = RunDir(recipe.run_folder)
    free = free_bytes(run_dir.folder) + _used(run_dir.checkpoints) + _used(run_dir.model)
    needed = number * need.checkpoint + need.model
    return DiskFacts(need.checkpoint, number, need.model, needed, free)


def lack_of_space(recipe: Recipe, facts: DiskFacts) -> RunError | None:
    """Why the run would fill the disk; None where there is room for it."""
    if facts.needed <= facts.free:
        return None
    return RunError(
        f"{RunDir(recipe.run_folder).folder} has room for {as_gigabytes(facts.free)}, and the run "
        f"needs {as_gigabytes(facts.needed)}: {facts.num_checkpoints} checkpoints of "
        f"{as_gigabytes(facts.checkpoint)} at its fullest moment, and the model of "
        f"{as_gigabytes(facts.model)}",
        remedy="free some space, keep fewer checkpoints (train.checkpoint.keep), or choose another "
        "place, such as output=/another/folder",
    )


def check_disk(recipe: Recipe, model: Any, tokenizer: Any, plan: Plan) -> None:
    """Raise `RunError` where the training of this model would fill the disk."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    need = estimate_disk(model, optimizer_bytes(recipe.train.optimizer, trained), tokenizer)
    if lack := lack_of_space(recipe, disk_facts(recipe, need, plan)):
        raise lack


def _used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
