"""A run in several processes: what is done once before they start, and how they share it."""

import os
import shlex
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from yrunner.assembly.probes import ask
from yrunner.assembly.replay import prepare_keep
from yrunner.assembly.run import Run
from yrunner.console import say
from yrunner.distributed.collectives import join_ranks
from yrunner.distributed.launcher import (
    ProcessRank,
    current_rank,
    launch_command,
    run_ranks,
)
from yrunner.distributed.topology import Topology, topology_of
from yrunner.errors import MissingError, RunError
from yrunner.recipe.schema.distributed import needs_whole_weights
from yrunner.recipe.schema.recipe import Recipe
from yrunner.storage.run_dir import read_json
from yrunner.training.deepspeed.config import (
    apart,
    check_settings,
    complete,
    deepspeed_settings,
    disk_folder,
    read_settings,
)
from yrunner.training.deepspeed.state import check_saved_alike


def ranks_to_launch(recipe: Recipe) -> Topology | None:
    """The processes to start for a run; None where this process trains."""
    if current_rank() is not None or not recipe.distributed.is_launched:
        return None
    layout = topology_of(recipe.distributed, torch.cuda.device_count())
    return layout if layout.num_ranks > 1 or recipe.distributed.deepspeed is not None else None


def this_process() -> ProcessRank:
    """Rank of this process among all; the first of one where the run has no other."""
    return current_rank() or ProcessRank(0, 1)


def is_launched() -> bool:
    """Whether another command has started this process."""
    return current_rank() is not None


def keeps_run_folder(layout: Topology | None) -> bool:
    """Whether the run folder is this process's to check and to fill, and not another one's."""
    place = current_rank()
    is_first_machine = layout is None or layout.machine == 0
    return is_first_machine and (place is None or place.rank == 0)


def say_launch(run: Run) -> None:
    """Print the command that starts the processes of this machine."""
    layout = topology_of(run.recipe.distributed, torch.cuda.device_count())
    say(shlex.join(_command(layout, run)))


def check_sharing(run: Run, layout: Topology) -> None:
    """Raise why this run cannot be shared by these processes, before any time is spent."""
    recipe = run.recipe
    micro_steps = updates_shared(run, layout.num_ranks).micro_steps
    if layout.num_machines > 1 and run.stale_base is not None:
        raise RunError(
            "the base has to be trained before several machines start from it",
            remedy=f"run yrun train {recipe.model.base} on one of them",
        )
    section = recipe.distributed.deepspeed
    if section is None:
        return
    if find_spec("deepspeed") is None:
        raise MissingError(
            "distributed.deepspeed needs DeepSpeed", remedy="run pip install 'yrunner[deepspeed]'"
        )
    _check_way_to_disk(deepspeed_settings(section))
    if section.config is not None:
        check_settings(
            section.config,
            recipe.train,
            dtype=str(run.dtype).removeprefix("torch."),
            micro_steps=micro_steps,
            num_ranks=layout.num_ranks,
        )
        _check_pieces(recipe, section.config)


def launch(run: Run, layout: Topology) -> None:
    """Prepare the data and let the processes train; they find it prepared."""
    run.refuse_faulty_rows()
    prepare_keep(run)
    say(f"training in {layout.num_ranks:,} processes{_where(layout)}")
    try:
        run_ranks(_command(layout, run), _environment(layout))
    finally:
        _free_disk(run.recipe)


def _free_disk(recipe: Recipe) -> None:
    """Remove what the processes have left on a disk of this machine: checkpoints have all of it."""
    section = recipe.distributed.deepspeed
    if section is not None:
        folder = disk_folder(deepspeed_settings(section), recipe.run_folder)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def init_process_group(recipe: Recipe) -> dict[str, Any] | None:
    """Meet the other processes, where there are any; gives back DeepSpeed's configuration."""
    section = recipe.distributed.deepspeed
    if current_rank() is not None:
        join_ranks(deepspeed=section is not None)
    if section is None:
        return None
    return apart(complete(deepspeed_settings(section)), recipe.run_folder)


class SharedUpdates(NamedTuple):
    """How the processes share an update."""

    started_by: int
    """Number of processes that started the run, which decides what an update learns from."""
    micro_steps: int
    """Of an update, in each of today's processes."""


def updates_shared(run: Run, num_ranks: int) -> SharedUpdates:
    """How `num_ranks` processes share the updates of a run, perhaps started by another number.

    Raises `RunError` where they cannot share an update evenly, or resume from its checkpoint.
    """
    recipe, run_dir = run.recipe, run.folder
    begun_by = num_ranks
    if run.options.resume:
        begun_by = read_json(run_dir.environment).get("processes", 1)
        newest = run_dir.checkpoint(run_dir.saved_steps()[-1])
        check_saved_alike(newest, under_zero=recipe.distributed.deepspeed is not None)
    micro_batches = recipe.train.gradient_accumulation_steps * begun_by
    if micro_batches % num_ranks:
        raise RunError(
            f"{run_dir.folder} was begun by {begun_by} processes, and an update has "
            f"{micro_batches} micro-batches, which {num_ranks} processes cannot share evenly",
            remedy=f"set distributed.processes to a number that divides {micro_batches}",
        )
    return SharedUpdates(begun_by, micro_batches // num_ranks)


def _check_pieces(recipe: Recipe, config: Path) -> None:
    """The recipe knows its own stage; that of a file is found here."""
    found = needs_whole_weights(tuning=recipe.tuning.kind, keep=recipe.keep.kind)
    if found is not None and read_settings(config)["zero_optimization"]["stage"] == 3:
        problem, remedy = found
        raise RunError(f"{config}: {problem}", remedy=remedy)


def _check_way_to_disk(settings: Mapping[str, Any]) -> None:
    """Raise where memory is to go to a disk and cannot: `MissingError` where DeepSpeed lacks the
    way, `RunError` where the folder cannot be written.

    DeepSpeed would notice only when the model is loaded and shared out.
    """
    place = settings["zero_optimization"].get("offload_optimizer") or {}
    if place.get("device") != "nvme":
        return
    if not place.get("nvme_path"):
        raise RunError(
            "offload_optimizer goes to a disk, and no folder is named there",
            remedy='add "nvme_path" to it',
        )
    folder = Path(place["nvme_path"])
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise RunError(
            f"the optimizer's memory is to lie in {folder}, which cannot be written",
            remedy="name a folder of yours on a fast disk",
        )
    for finding in ask("deepspeed"):
        if finding.part in ("async_io", "deepspeed") and finding.state == "missing":
            raise MissingError(
                f"offloading to a disk needs DeepSpeed's async_io: {finding.found}",
                remedy=f"run {finding.remedy}",
            )


def _command(layout: Topology, run: Run) -> list[str]:
    arguments = shlex.split(run.options.arguments)
    return launch_command(layout, ["train", *arguments, *run.options.flags])


def _where(layout: Topology) -> str:
    if layout.num_machines == 1:
        return ""
    return f" on {layout.num_machines:,} machines, of which this is number {layout.machine}"


def _environment(layout: Topology) -> dict[str, str]:
    """On processors alone the processes share the cores."""
    if torch.cuda.is_available() or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // layout.processes))}
