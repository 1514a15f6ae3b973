"""The recipe's `distributed`: processes, machines and DeepSpeed."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from yrunner.recipe.schema.section import RecipeFile, Section

SHARED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Element-wise optimizers: they work on the flat shards that DeepSpeed passes to them."""


class RendezvousMachines(Section):
    """Machines that meet at an address; run the command on each with its own `this`."""

    kind: Literal["rendezvous"]
    number: int = Field(ge=2)
    """Number of machines."""
    this: int = Field(0, ge=0)
    """Index of this machine, from 0: distributed.machines.this=1 on the second one."""
    address: str = Field(pattern=r"^[^\s:]+:[0-9]+$")
    """Host and free port of machine 0, such as node0:29500."""

    @model_validator(mode="after")
    def this_is_one_of_them(self) -> Self:
        if self.this >= self.number:
            raise ValueError(f"this starts at 0 and must be below number, {self.number}")
        return self


class HostfileMachines(Section):
    """Machines listed in a DeepSpeed hostfile, one per line: `node0 slots=8`."""

    kind: Literal["hostfile"]
    file: RecipeFile
    """The hostfile. All machines meet at the first one; slots are processes per machine."""
    port: int = Field(29500, ge=1, le=65535)
    """A free port on the first machine."""


class SlurmMachines(Section):
    """The machines of a SLURM job; start the command with `srun`, once per machine."""

    kind: Literal["slurm"]
    port: int = Field(29500, ge=1, le=65535)
    """A free port on the job's first machine."""


Machines = Annotated[
    RendezvousMachines | HostfileMachines | SlurmMachines, Field(discriminator="kind")
]


class DeepSpeedSection(Section):
    """Sharding by DeepSpeed: a ZeRO stage, or a configuration file."""

    stage: Literal[1, 2, 3] | None = None
    """ZeRO stage. 1: shard the optimizer state. 2: also the gradients. 3: also the weights."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where to keep the shards instead of the GPU. `cpu`: in CPU memory. `nvme`: weights in CPU
    memory, optimizer state on a fast disk."""
    nvme_folder: Path | None = None
    """A folder on that disk; each run creates its own subfolder."""
    config: RecipeFile | None = None
    """A DeepSpeed JSON file instead of stage and offload; see deepspeed_configs/README.md."""

    @model_validator(mode="after")
    def a_stage_or_a_file(self) -> Self:
        if (self.stage is None) == (self.config is None):
            raise ValueError('needs exactly one of "stage" and "config"')
        if self.config is not None and self.offload != "none":
            raise ValueError("set offload in the config file instead; remove it here")
        return self

    @model_validator(mode="after")
    def a_disk_has_a_folder(self) -> Self:
        if (self.offload == "nvme") != (self.nvme_folder is not None):
            raise ValueError('offload "nvme" and nvme_folder require each other')
        if self.offload == "nvme" and self.stage != 3:
            raise ValueError('offload "nvme" needs stage 3; with stage 1 or 2 use "cpu"')
        return self


class DistributedSection(Section):
    """How the run is distributed over processes and machines. It does not change results."""

    processes: Literal["auto"] | Annotated[int, Field(ge=1)] = 1
    """Processes per machine; `auto`: one per GPU. An update takes batch_size times
    gradient_accumulation_steps rows from every process."""
    machines: Machines | None = None
    """The machines of the run. Default: only this one."""
    deepspeed: DeepSpeedSection | None = None
    """Shard memory with DeepSpeed. Default: every process holds everything."""

    @property
    def is_launched(self) -> bool:
        """Whether the run needs a launcher."""
        return self.processes != 1 or self.machines is not None or self.deepspeed is not None

    def conflict(
        self, *, tuning: str, optimizer: str, torch_compile: bool, keep: str
    ) -> str | None:
        """Which other setting of the recipe does not work with this section; None if all do."""
        if self.deepspeed is None:
            return None
        if optimizer not in SHARED_OPTIMIZERS:
            return (
                f"train.optimizer {optimizer} needs whole weights, but DeepSpeed shards them; "
                f"use {', '.join(SHARED_OPTIMIZERS)}"
            )
        found = needs_whole_weights(tuning=tuning, keep=keep)
        if self.deepspeed.stage == 3 and found is not None:
            return "; ".join(found)
        if torch_compile:
            return "train.torch_compile and distributed.deepspeed cannot be combined; remove one"
        return None


def needs_whole_weights(*, tuning: str, keep: str) -> tuple[str, str] | None:
    """Why a recipe cannot be trained with weights sharded by ZeRO stage 3, and the remedy."""
    if tuning == "qlora":
        return "quantized weights cannot be sharded", "use deepspeed.stage 2 or 1"
    if keep == "ewc":
        problem = "keep.kind ewc needs whole weights, but ZeRO stage 3 shards them"
        return problem, "use deepspeed.stage 2 or 1, or keep.kind self_replay"
    return None
