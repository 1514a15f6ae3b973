"""Runs in several processes: checks, launch, and how ranks share an update."""

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
from yrunner.console import counted, say
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
    """The ranks to launch for a run; None if this process trains."""
    if current_rank() is not None or not recipe.distributed.is_launched:
        return None
    topology = topology_of(recipe.distributed, torch.cuda.device_count())
    return topology if topology.num_ranks > 1 or recipe.distributed.deepspeed is not None else None


def this_process() -> ProcessRank:
    """Rank and world size of this process."""
    return current_rank() or ProcessRank(0, 1)


def is_launched() -> bool:
    """Whether another command launched this process."""
    return current_rank() is not None


def keeps_run_folder(topology: Topology | None) -> bool:
    """Whether this process checks and writes the run folder."""
    process = current_rank()
    is_first_machine = topology is None or topology.machine == 0
    return is_first_machine and (process is None or process.rank == 0)


def say_launch(run: Run) -> None:
    """Print the command that launches the ranks of this machine."""
    topology = topology_of(run.recipe.distributed, torch.cuda.device_count())
    say(shlex.join(_command(topology, run)))


def check_ranks(run: Run) -> None:
    """Raise `YRunnerError` if the ranks that the recipe asks for cannot share the run."""
    topology = ranks_to_launch(run.recipe)
    if topology is not None:
        check_sharing(run, topology)


def check_sharing(run: Run, topology: Topology) -> None:
    """Raise `YRunnerError` if these ranks cannot share this run, before any time is spent."""
    recipe = run.recipe
    micro_steps = updates_shared(run, topology.num_ranks).micro_steps
    judges = [("reward model", judge) for judge, _ in run.untrained_judges]
    others = [("base", run.untrained_base), ("teacher", run.untrained_teacher), *judges]
    for name, other in others:
        if topology.num_machines > 1 and other is not None:
            raise RunError(
                f"the {name} must be trained before several machines start",
                remedy=f"run yrun train {other.options.arguments} on one of them",
            )
    for sorting in run.sorts if topology.num_machines > 1 else ():
        if sorting.stale_sort() is not None:
            raise RunError(
                f"the rows of {sorting.recipe.name} must be sorted before several machines learn "
                "from them",
                remedy=f"run yrun sort {sorting.options.arguments} on one of them",
            )
    section = recipe.distributed.deepspeed
    if section is None:
        return
    if find_spec("deepspeed") is None:
        raise MissingError(
            "distributed.deepspeed needs DeepSpeed", remedy="run pip install 'yrunner[deepspeed]'"
        )
    _check_nvme_offload(deepspeed_settings(section))
    if section.config is not None:
        check_settings(
            section.config,
            recipe.train,
            dtype=str(run.dtype).removeprefix("torch."),
            micro_steps=micro_steps,
            num_ranks=topology.num_ranks,
        )
        _check_needs_of_stage(recipe, section.config)


def launch(run: Run, topology: Topology) -> None:
    """Tokenize the data, then launch the ranks, which find it in the cache."""
    run.refuse_faulty_rows()
    prepare_keep(run)
    say(f"training in {counted(topology.num_ranks, 'process', 'processes')}{_where(topology)}")
    try:
        run_ranks(_command(topology, run), _environment(topology))
    finally:
        _free_disk(run.recipe)


def _free_disk(recipe: Recipe) -> None:
    """Remove what the ranks have offloaded to disk; checkpoints have all of it."""
    section = recipe.distributed.deepspeed
    if section is not None:
        folder = disk_folder(deepspeed_settings(section), recipe.run_folder)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def init_process_group(recipe: Recipe) -> dict[str, Any] | None:
    """Join the process group, if there is one; return DeepSpeed's configuration."""
    section = recipe.distributed.deepspeed
    if current_rank() is not None:
        join_ranks(deepspeed=section is not None)
    if section is None:
        return None
    return apart(complete(deepspeed_settings(section)), recipe.run_folder)


class SharedUpdates(NamedTuple):
    """How ranks share an update."""

    started_by: int
    """World size at the start of the run, which decides the rows of an update."""
    micro_steps: int
    """Micro-steps of an update in each rank now."""


def updates_shared(run: Run, num_ranks: int) -> SharedUpdates:
    """How `num_ranks` ranks share the updates of a run that another number may have started.

    Raises `RunError` if they cannot share an update evenly or resume from its checkpoint.
    """
    recipe, run_dir = run.recipe, run.folder
    started_by = num_ranks
    if run.options.resume:
        started_by = read_json(run_dir.environment).get("processes", 1)
        newest = run_dir.checkpoint(run_dir.saved_steps()[-1])
        check_saved_alike(newest, under_zero=recipe.distributed.deepspeed is not None)
    micro_batches = recipe.train.gradient_accumulation_steps * started_by
    if micro_batches % num_ranks:
        raise RunError(
            f"{run_dir.folder} was started by {counted(started_by, 'process', 'processes')}, and "
            f"an update has {counted(micro_batches, 'micro-batch', 'micro-batches')}, which "
            f"{counted(num_ranks, 'process', 'processes')} cannot share evenly",
            remedy=f"set distributed.processes to a number that divides {micro_batches}",
        )
    return SharedUpdates(started_by, micro_batches // num_ranks)


def _check_needs_of_stage(recipe: Recipe, config: Path) -> None:
    """Check the ZeRO stage of a config file; that of the recipe is checked by its schema."""
    found = needs_whole_weights(tuning=recipe.tuning.kind, keep=recipe.keep.kind)
    if found is None and recipe.teacher is not None and recipe.teacher.on_policy:
        problem = "teacher.on_policy needs whole weights, but ZeRO stage 3 shards them"
        found = problem, "use stage 2 or 1, or remove on_policy"
    if found is not None and read_settings(config)["zero_optimization"]["stage"] == 3:
        problem, remedy = found
        raise RunError(f"{config}: {problem}", remedy=remedy)


def _check_nvme_offload(settings: Mapping[str, Any]) -> None:
    """Check that the optimizer can be offloaded to disk, if the settings say so.

    Raises `MissingError` if DeepSpeed lacks async_io, `RunError` if the folder is not writable.
    DeepSpeed itself would notice only after loading and sharding the model.
    """
    offload = settings["zero_optimization"].get("offload_optimizer") or {}
    if offload.get("device") != "nvme":
        return
    if not offload.get("nvme_path"):
        raise RunError(
            'offload_optimizer has device "nvme" but no folder', remedy='add "nvme_path" to it'
        )
    folder = Path(offload["nvme_path"])
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise RunError(
            f"cannot offload the optimizer to {folder}, which is not writable",
            remedy="choose a writable folder on a fast disk",
        )
    for finding in ask("deepspeed"):
        if finding.part in ("async_io", "deepspeed") and finding.state == "missing":
            raise MissingError(
                f"offloading to a disk needs DeepSpeed's async_io: {finding.found}",
                remedy=f"run {finding.remedy}",
            )


def _command(topology: Topology, run: Run) -> list[str]:
    arguments = shlex.split(run.options.arguments)
    return launch_command(topology, ["train", *arguments, *run.options.flags])


def _where(topology: Topology) -> str:
    if topology.num_machines == 1:
        return ""
    return f" on {topology.num_machines:,} machines, this is number {topology.machine}"


def _environment(topology: Topology) -> dict[str, str]:
    """Without GPUs, the ranks share the cores."""
    if torch.cuda.is_available() or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // topology.processes))}
