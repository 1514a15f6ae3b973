"""The recipe's `distributed`: how many processes train together, where, and what they share out."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from yrunner.recipe.schema.section import RecipeFile, Section

SHARED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Optimizers that treat every number alike: DeepSpeed hands them flat pieces of the weights."""


class RendezvousMachines(Section):
    """Machines that meet at an address; the command is started on each with its own `this`."""

    kind: Literal["rendezvous"]
    number: int = Field(ge=2)
    """How many machines."""
    this: int = Field(0, ge=0)
    """Which of them this is, from 0: give it as distributed.machines.this=1 on the second."""
    address: str = Field(pattern=r"^[^\s:]+:[0-9]+$")
    """Host and port where they meet, such as node0:29500: a free port of machine 0."""

    @model_validator(mode="after")
    def this_is_one_of_them(self) -> Self:
        if self.this >= self.number:
            raise ValueError(f"this counts from 0 and must be below number, {self.number}")
        return self


class HostfileMachines(Section):
    """Machines that a DeepSpeed hostfile lists, one a line: `node0 slots=8`."""

    kind: Literal["hostfile"]
    file: RecipeFile
    """The hostfile. The first machine in it is where all meet; slots are its processes."""
    port: int = Field(29500, ge=1, le=65535)
    """A free port of the first machine."""


class SlurmMachines(Section):
    """The machines of a SLURM job: start the command by `srun` once on each of them."""

    kind: Literal["slurm"]
    port: int = Field(29500, ge=1, le=65535)
    """A free port of the job's first machine."""


Machines = Annotated[
    RendezvousMachines | HostfileMachines | SlurmMachines, Field(discriminator="kind")
]


class DeepSpeedSection(Section):
    """What DeepSpeed shares out over the processes: a stage of ZeRO, or a configuration file."""

    stage: Literal[1, 2, 3] | None = None
    """1: the optimizer's memory. 2: the gradients too. 3: the weights too."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Keep what is shared out off the GPU. cpu: in the machine's memory. nvme: the weights there,
    the optimizer on a fast disk."""
    nvme_folder: Path | None = None
    """A folder on that disk; each run makes one of its own in it."""
    config: RecipeFile | None = None
    """DeepSpeed's own JSON instead of stage and offload; see deepspeed_configs/README.md."""

    @model_validator(mode="after")
    def a_stage_or_a_file(self) -> Self:
        if (self.stage is None) == (self.config is None):
            raise ValueError('needs either "stage" or "config", and not both')
        if self.config is not None and self.offload != "none":
            raise ValueError("offload belongs into the file that config names; remove it here")
        return self

    @model_validator(mode="after")
    def a_disk_has_a_folder(self) -> Self:
        if (self.offload == "nvme") != (self.nvme_folder is not None):
            raise ValueError('offload "nvme" and nvme_folder need each other')
        if self.offload == "nvme" and self.stage != 3:
            raise ValueError('offload "nvme" needs stage 3; with stage 1 or 2 use "cpu"')
        return self


class DistributedSection(Section):
    """How the run is spread over processes and machines. It cannot change what is learned."""

    processes: Literal["auto"] | Annotated[int, Field(ge=1)] = 1
    """Processes on each machine; auto: one for each GPU. An update learns from batch_size times
    gradient_accumulation_steps rows of every process."""
    machines: Machines | None = None
    """Several machines; none: this one."""
    deepspeed: DeepSpeedSection | None = None
    """Share memory out by DeepSpeed; none: every process holds all of it."""

    @property
    def is_launched(self) -> bool:
        """Whether the run needs processes of its own, which a launcher starts."""
        return self.processes != 1 or self.machines is not None or self.deepspeed is not None

    def conflict(
        self, *, tuning: str, optimizer: str, torch_compile: bool, keep: str
    ) -> str | None:
        """What of the rest of the recipe cannot be shared out so; None where all can."""
        if self.deepspeed is None:
            return None
        if optimizer not in SHARED_OPTIMIZERS:
            return (
                f"train.optimizer {optimizer} looks at whole weights, which DeepSpeed cuts into "
                f"pieces; use {', '.join(SHARED_OPTIMIZERS)}"
            )
        if self.deepspeed.stage == 3 and (found := needs_whole_weights(tuning=tuning, keep=keep)):
            return "; ".join(found)
        if torch_compile:
            return "train.torch_compile and distributed.deepspeed cannot be combined; remove one"
        return None


def needs_whole_weights(*, tuning: str, keep: str) -> tuple[str, str] | None:
    """What of a recipe cannot be learned where ZeRO stage 3 cuts the weights, and what can."""
    if tuning == "qlora":
        return "quantized weights cannot be cut into pieces", "use deepspeed.stage 2 or 1"
    if keep == "ewc":
        problem = "keep.kind ewc looks at whole weights, which ZeRO stage 3 cuts into pieces"
        return problem, "use deepspeed.stage 2 or 1, or keep.kind self_replay"
    return None
