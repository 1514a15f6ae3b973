"""A training whose memory DeepSpeed shares out: its steps, its checkpoints, its whole weights.

DeepSpeed's own checkpoints fit only the number of processes that wrote them, and its stage. Here
every weight and what the optimizer remembers of it is gathered, one after the other, and written
under its name: any number of processes, and any stage, goes on from it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from yrunner.errors import RunError
from yrunner.ranks import num_ranks, this_rank
from yrunner.run_dir import read_json, write_json

FOLDER, STEP = "zero", "step.json"
SHARD_BYTES = 2**31
"""Rank 0 holds so much of the optimizer's memory at once, and one weight, while it is written."""
WEIGHT = "weight"
MOMENTS = {
    "adamw_torch": ("exp_avg", "exp_avg_sq"),
    "adamw_torch_fused": ("exp_avg", "exp_avg_sq"),
    "sgd": (),
}
"""What each optimizer remembers of a weight."""


class ZeroRun:
    """What DeepSpeed's engine of a `Trainer` needs beyond what Trainer does."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.stage: int = trainer.accelerator.state.deepspeed_plugin.zero_stage
        self.moments = MOMENTS[trainer.args.optim]
        if not self.is_partitioned:
            # Trainer leaves it to DeepSpeed, which comes later than the first look at the model.
            trainer.model.to(trainer.args.device)

    @property
    def is_partitioned(self) -> bool:
        """Whether the weights are shared out too: they are whole only where they are used."""
        return self.stage == 3

    def multiplied_when_stepping(self, loss: Tensor, factor: float) -> Tensor:
        """The loss to run backward, so that the gradient of the whole update becomes `factor` times
        as long.

        The step divides all gradients by the scale of the last loss; the clipping knows of it.
        """
        scale = 1.0 / factor
        self._optimizer.override_loss_scale(scale)
        return loss / scale

    def run_backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the update, before those of its micro-batch.

        DeepSpeed counts on a backward pass after each forward pass. After two of them ZeRO-3 would
        not let go of the weights that it gathers, until all were on every device.
        """
        engine = self.trainer.deepspeed
        engine.set_gradient_accumulation_boundary(False)
        engine.backward(loss, scale_wrt_gas=False)

    def save(self, folder: Path) -> None:
        """Write weights and what the optimizer remembers of them. All processes call it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link_moments()
        shard: dict[str, Tensor] = {}
        number = 0
        (folder / FOLDER).mkdir(exist_ok=True)
        for name, parameter in self._trained():
            found = {WEIGHT: safe_get_full_fp32_param(parameter)}
            for key in self.moments:
                found[key] = safe_get_full_optimizer_state(parameter, key)
            if this_rank() != 0:
                continue
            shard |= {f"{key} {name}": _on_cpu(tensor) for key, tensor in found.items()}
            if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
                save_file(shard, folder / FOLDER / f"{number}.safetensors")
                shard, number = {}, number + 1
        if this_rank() == 0:
            save_file(shard, folder / FOLDER / f"{number}.safetensors")
            write_json(folder / FOLDER / STEP, {"step": self.trainer.state.global_step})

    def load(self, checkpoint: Path, *, with_moments: bool = True) -> None:
        """Go on from what `save` wrote; `with_moments`: also the optimizer."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if with_moments:
            self._make_room_for_moments(read_json(checkpoint / FOLDER / STEP)["step"])
            self._link_moments()
        saved = _Saved(checkpoint / FOLDER)
        for name, parameter in self._trained():
            self._set_weight(parameter, saved.read(f"{WEIGHT} {name}"))
            for key in self.moments if with_moments else ():
                value = saved.read(f"{key} {name}").to(parameter.device)
                if self.is_partitioned:
                    safe_set_local_optimizer_state(parameter, _own_part(parameter, value), key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)

    def whole_weights(self) -> dict[str, Tensor]:
        """Every weight that is saved by its name, trained ones in float32; empty but for rank 0.

        All processes call it. Rank 0 holds these in its memory then.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self._saved():
            with self._gathered(parameter):
                whole = (
                    safe_get_full_fp32_param(parameter) if parameter.requires_grad else parameter
                )
                if this_rank() == 0:
                    weights[name] = _on_cpu(whole)
        return weights

    @property
    def _optimizer(self) -> Any:
        return self.trainer.deepspeed.optimizer

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.trainer.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def _saved(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All of a model; of an adapter no weight of its base, which is not written either."""
        is_adapter = isinstance(self.trainer.model, PeftModel)
        for name, parameter in self.trainer.model.named_parameters():
            if parameter.requires_grad or not is_adapter:
                yield name, parameter

    def _gathered(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        if not self.is_partitioned or parameter.requires_grad:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters([parameter])

    def _set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a trained weight: the one that is computed with, and the optimizer's own."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        value = value.to(parameter.device)
        if not self.is_partitioned:
            safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)
            return
        part = _own_part(parameter, value)
        safe_set_local_fp32_param(parameter, part)
        cut: Any = parameter
        cut.ds_tensor.data.copy_(part)
        if parameter.numel():  # small ones stay whole everywhere
            parameter.data.copy_(value)

    def _make_room_for_moments(self, step: int) -> None:
        """Give the optimizer what it makes at its first step; `step` of them are done."""
        flat = (
            self._optimizer.fp32_partitioned_groups_flat
            if self.is_partitioned
            else self._optimizer.single_partition_of_fp32_groups
        )
        inner = self._optimizer.optimizer
        if not self.moments:
            return
        for part in flat:
            where = part.device if inner.defaults.get("fused") else "cpu"
            inner.state[part] = {"step": torch.tensor(float(step), device=where)}
            inner.state[part] |= {key: torch.zeros_like(part) for key in self.moments}

    def _link_moments(self) -> None:
        """Let DeepSpeed find the memory of each weight.

        It links all of them after the first step of the first group of weights, when those of the
        other groups have none yet, and then no more.
        """
        if not self.is_partitioned:
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()


class AtBegin(TrainerCallback):
    """Does something when DeepSpeed has taken over the model, before the first update."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Do it."""
        self.action()


def check_saved_alike(checkpoint: Path, *, under_zero: bool) -> None:
    """Raise `RunError` where one of run and checkpoint is DeepSpeed's, and the other is not."""
    if (checkpoint / FOLDER / STEP).exists() == under_zero:
        return
    saved, go_on = ("without", "without") if under_zero else ("under", "with")
    raise RunError(
        f"{checkpoint} was saved {saved} DeepSpeed",
        remedy=f"go on {go_on} distributed.deepspeed, or start anew with --overwrite",
    )


class _Saved:
    """The tensors of all shards, by name."""

    def __init__(self, folder: Path) -> None:
        self.places: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self.places |= dict.fromkeys(file.keys(), path)

    def read(self, name: str) -> Tensor:
        """One tensor, on the processor."""
        with safe_open(self.places[name], framework="pt") as file:
            return file.get_tensor(name)


def _own_part(parameter: Any, value: Tensor) -> Tensor:
    """The piece of a whole weight that this process keeps; the last ones are filled up with 0."""
    size = parameter.ds_tensor.ds_numel
    flat = nn.functional.pad(value.flatten(), (0, size * num_ranks() - value.numel()))
    return flat[size * this_rank() : size * (this_rank() + 1)]


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy that shares no memory: what was gathered is used again for the next weight."""
    return tensor.detach().to("cpu", copy=True).contiguous()
