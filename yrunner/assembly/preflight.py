"""What would make a run fail later, looked for first: packages, disk space, lengths of rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yrunner.assembly.run import Run
from yrunner.console import as_gigabytes
from yrunner.data.batching.plan import Plan
from yrunner.errors import RunError
from yrunner.models.limits import check_lengths
from yrunner.models.load import check_ids
from yrunner.models.quantization import require_bitsandbytes
from yrunner.models.size import DiskNeed, estimate_disk
from yrunner.recipe.schema.model import QloraTuning
from yrunner.recipe.schema.recipe import Recipe
from yrunner.storage.run_dir import free_bytes
from yrunner.training.arguments import OF_BITSANDBYTES
from yrunner.training.callbacks import count_checkpoints
from yrunner.training.compile import check_compiler
from yrunner.training.memory.trace import optimizer_bytes
from yrunner.training.trackers import check_trackers


def check_needs(recipe: Recipe) -> None:
    """Raise `MissingError` for a package or a compiler that is not there."""
    check_trackers(recipe.train.trackers)
    if recipe.train.torch_compile:
        check_compiler()
    if recipe.train.optimizer in OF_BITSANDBYTES:
        require_bitsandbytes(f"train.optimizer {recipe.train.optimizer}")
    if isinstance(recipe.tuning, QloraTuning):
        require_bitsandbytes("tuning.kind qlora")


def check_fit(run: Run) -> None:
    """Look whether the recipe's model can read every row, before its weights are loaded.

    Raises `DataError` with the longest row where it has more tokens than the model positions, and
    `ModelError` where the tokenizer has ids that the model has no embedding for.
    """
    config, prepared = run.config, run.dataset
    check_ids(run.tokenizer, config.get_text_config().vocab_size)
    for examples in (prepared.train, prepared.validation):
        check_lengths(examples.lengths, examples.origin, config)


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


def disk_facts(run: Run, need: DiskNeed, plan: Plan) -> DiskFacts:
    """The need of a recipe's run, beside what is free where it writes."""
    recipe, run_dir = run.recipe, run.folder
    validates = bool(recipe.data.validation) or recipe.data.validation_share is not None
    section = recipe.train.checkpoint
    # Beside the newest there is the best one by validation; one is written before another goes.
    written = count_checkpoints(plan.num_updates, section.every, plan.epoch_ends)
    number = min(section.keep + validates + 1, written)
    free = free_bytes(run_dir.folder) + _used(run_dir.checkpoints) + _used(run_dir.model)
    needed = number * need.checkpoint + need.model
    return DiskFacts(need.checkpoint, number, need.model, needed, free)


def lack_of_space(run: Run, facts: DiskFacts) -> RunError | None:
    """Why the run would fill the disk; None where there is room for it."""
    if facts.needed <= facts.free:
        return None
    return RunError(
        f"{run.folder.folder} has room for {as_gigabytes(facts.free)}, and the run "
        f"needs {as_gigabytes(facts.needed)}: {facts.num_checkpoints} checkpoints of "
        f"{as_gigabytes(facts.checkpoint)} at its fullest moment, and the model of "
        f"{as_gigabytes(facts.model)}",
        remedy="free some space, keep fewer checkpoints (train.checkpoint.keep), or choose another "
        "place, such as output=/another/folder",
    )


def check_disk(run: Run, model: Any, plan: Plan) -> None:
    """Raise `RunError` where the training of this model would fill the disk."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    need = estimate_disk(model, optimizer_bytes(run.recipe.train.optimizer, trained), run.tokenizer)
    if lack := lack_of_space(run, disk_facts(run, need, plan)):
        raise lack


def _used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
