"""Training under DeepSpeed ZeRO: backward passes, sharded checkpoints, gathered weights.

DeepSpeed's own checkpoints fit only the stage and the number of ranks that wrote them. Here each
weight and its optimizer state is gathered in turn and written under its name, so that any stage and
any number of ranks can resume.

With offloading to a disk, DeepSpeed's functions read a whole group of weights again for each of its
weights. Here a group is read once, and written once if it has changed.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainingArguments

from yrunner.distributed.collectives import num_ranks, this_rank
from yrunner.errors import RunError
from yrunner.storage.run_dir import read_json, write_json

WEIGHT = "weight"
"""The key of a weight itself, in float32; the others are the optimizer's own."""


class ZeroShards:
    """The pieces of this process, by DeepSpeed's groups of weights."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def groups(self) -> range:
        """The groups, the same in every process."""
        return range(len(self.optimizer.fp16_groups))

    def weights(self, group: int) -> Sequence[nn.Parameter]:
        """The trained weights of a group."""
        weights: Sequence[nn.Parameter] = self.optimizer.fp16_groups[group]
        return weights

    @contextmanager
    def at_hand(self, group: int, *, changes: bool = False) -> Iterator[None]:
        """Have the pieces of a group in memory meanwhile, and write them where they have changed.

        Nothing moves where the optimizer's memory is not on a disk.
        """
        from deepspeed.accelerator import get_accelerator

        get_accelerator().synchronize()
        optimizer = self.optimizer
        is_on_disk = optimizer._swappable_optimizer_subgroup(group)
        if is_on_disk:
            optimizer._optimizer_states_and_gradient_swap_in(group)
        yield
        if changes:
            # As after an update: what is computed with is made of it.
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if is_on_disk and changes:
            optimizer._optimizer_states_and_gradient_swap_out(group)
        elif is_on_disk:
            optimizer._release_swap_buffers(group)

    def make_room(self, group: int, keys: Sequence[str], step: int) -> None:
        """Give the optimizer what it makes at its first step; `step` of them are done."""
        flat, inner = self.optimizer.fp32_partitioned_groups_flat[group], self.optimizer.optimizer
        inner.state[flat] = new_state(inner, flat, keys, step)

    def whole(self, weight: nn.Parameter, key: str) -> Tensor:
        """The pieces of all processes together. All of them call it, with the group at hand."""
        piece = self._piece(weight, key).to(weight.device)
        whole: Tensor = self.optimizer._fp32_state_allgather(weight, piece)
        return whole

    def set(self, weight: nn.Parameter, key: str, value: Tensor) -> None:
        """Take this process's piece of a whole tensor; the group is at hand, and changes."""
        piece = self._piece(weight, key)
        # The last ones are filled up with 0.
        missing = piece.numel() * num_ranks() - value.numel()
        flat = nn.functional.pad(value.flatten(), (0, missing))
        piece.copy_(flat[piece.numel() * this_rank() : piece.numel() * (this_rank() + 1)])
        if key == WEIGHT and weight.numel():  # small ones stay whole everywhere
            weight.data.copy_(value)

    def _piece(self, weight: nn.Parameter, key: str) -> Tensor:
        optimizer = self.optimizer
        group, start, size = optimizer.grad_position[optimizer.get_param_id(weight)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        held: Tensor = flat if key == WEIGHT else optimizer.optimizer.state[flat][key]
        return held.detach().narrow(0, start, size)


def new_state(
    inner: torch.optim.Optimizer, flat: Tensor, keys: Sequence[str], step: int
) -> dict[str, Tensor]:
    """What an optimizer of torch remembers of a flat piece when it has seen nothing yet."""
    where = flat.device if inner.defaults.get("fused") else "cpu"
    counter = torch.tensor(float(step), device=where)
    return {"step": counter} | {key: torch.zeros_like(flat) for key in keys}


FOLDER, STEP = "zero", "step.json"
SHARD_BYTES = 2**31
"""Rank 0 holds so much of the optimizer's memory at once, and one weight, while it is written."""
MOMENTS = {
    "adamw_torch": ("exp_avg", "exp_avg_sq"),
    "adamw_torch_fused": ("exp_avg", "exp_avg_sq"),
    "sgd": (),
}
"""What each optimizer remembers of a weight."""


class ZeroRun:
    """What a training needs of DeepSpeed's engine beyond what accelerate does."""

    def __init__(self, model: Any, stage: int, optimizer: str) -> None:
        """`stage`: DeepSpeed's ZeRO stage; `optimizer`: by the name that the recipe gives it."""
        self.model = model
        self.stage = stage
        self.moments = MOMENTS[optimizer]
        self.engine: Any = None
        """Set when DeepSpeed has taken over the model."""

    @property
    def is_partitioned(self) -> bool:
        """Whether weights are sharded too (ZeRO-3), and gathered only while they are used."""
        return self.stage == 3

    def multiplied_when_stepping(self, loss: Tensor, factor: float) -> Tensor:
        """The loss to run backward, so that the gradient of the whole update becomes `factor` times
        as long.

        The step divides all gradients by the scale of the last loss; the clipping knows of it.
        """
        scale = 1.0 / factor
        self.optimizer.override_loss_scale(scale)
        return loss / scale

    def run_backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the update, before those of its micro-batch.

        DeepSpeed counts on a backward pass after each forward pass. After two of them ZeRO-3 would
        not let go of the weights that it gathers, until all were on every device.
        """
        self.engine.set_gradient_accumulation_boundary(False)
        self.engine.backward(loss, scale_wrt_gas=False)

    def save(self, folder: Path, step: int) -> None:
        """Write the weights and the optimizer state after `step` updates.

        All processes call it.
        """
        shard: dict[str, Tensor] = {}
        number = 0
        (folder / FOLDER).mkdir(exist_ok=True)
        for name, found in self._gathered_states((WEIGHT, *self.moments)):
            if this_rank() != 0:
                continue
            shard |= {f"{key} {name}": _on_cpu(tensor) for key, tensor in found.items()}
            if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
                save_file(shard, folder / FOLDER / f"{number}.safetensors")
                shard, number = {}, number + 1
        if this_rank() == 0:
            save_file(shard, folder / FOLDER / f"{number}.safetensors")
            write_json(folder / FOLDER / STEP, {"step": step})

    def load(self, checkpoint: Path, *, with_moments: bool = True) -> None:
        """Load what `save` wrote; `with_moments`: the optimizer state too."""
        step = read_json(checkpoint / FOLDER / STEP)["step"]
        moments = self.moments if with_moments else ()
        saved = _Saved(checkpoint / FOLDER)
        if self.is_partitioned:
            self._load_pieces(saved, moments, step)
        else:
            self._load_whole(saved, moments, step)

    def whole_weights(self) -> dict[str, Tensor]:
        """Every weight that is saved by its name, trained ones in float32; empty but for rank 0.

        All processes call it. Rank 0 holds these in its memory then.
        """
        weights = {}
        for name, found in self._gathered_states((WEIGHT,)):
            if this_rank() == 0:
                weights[name] = _on_cpu(found[WEIGHT])
        for name, parameter in self._saved_frozen():
            with self._gathered(parameter):
                if this_rank() == 0:
                    weights[name] = _on_cpu(parameter)
        return weights

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's, around torch's."""
        return self.engine.optimizer

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def _saved_frozen(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is not trained of a model; nothing of an adapter's base, which is not written."""
        if not isinstance(self.model, PeftModel):
            for name, parameter in self.model.named_parameters():
                if not parameter.requires_grad:
                    yield name, parameter

    def _gathered(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        if not self.is_partitioned:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters([parameter])

    def _gathered_states(self, keys: Sequence[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Every trained weight by its name, whole in float32, and what is remembered of it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.is_partitioned:
            pieces, names = ZeroShards(self.optimizer), self._names()
            for group in pieces.groups:
                with pieces.at_hand(group):
                    for weight in pieces.weights(group):
                        yield names[weight], {key: pieces.whole(weight, key) for key in keys}
            return
        if keys[1:]:
            self._link_moments()
        for name, parameter in self._trained():
            found = {WEIGHT: safe_get_full_fp32_param(parameter)}
            for key in keys[1:]:
                found[key] = safe_get_full_optimizer_state(parameter, key)
            yield name, found

    def _names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self._trained()}

    def _load_pieces(self, saved: "_Saved", moments: Sequence[str], step: int) -> None:
        pieces, names = ZeroShards(self.optimizer), self._names()
        for group in pieces.groups:
            with pieces.at_hand(group, changes=True):
                if moments:
                    pieces.make_room(group, moments, step)
                for weight in pieces.weights(group):
                    for key in (WEIGHT, *moments):
                        value = saved.read(f"{key} {names[weight]}").to(weight.device)
                        pieces.set(weight, key, value)

    def _load_whole(self, saved: "_Saved", moments: Sequence[str], step: int) -> None:
        """Where only the optimizer's memory is cut: weights are whole in every process."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if moments:
            inner = self.optimizer.optimizer
            for flat in self.optimizer.single_partition_of_fp32_groups:
                inner.state[flat] = new_state(inner, flat, moments, step)
            self._link_moments()
        for name, parameter in self._trained():
            value = saved.read(f"{WEIGHT} {name}").to(parameter.device)
            safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)
            for key in moments:
                value = saved.read(f"{key} {name}").to(parameter.device)
                safe_set_full_optimizer_state(parameter, value, key)

    def _link_moments(self) -> None:
        """Let DeepSpeed find the memory of each weight.

        It links all of them after the first step of the first group of weights, when those of the
        other groups have none yet, and then no more.
        """
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()


def zero_run(accelerator: Accelerator, arguments: TrainingArguments, model: Any) -> ZeroRun | None:
    """What a training under DeepSpeed needs, with a configuration that is complete; else None."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return None
    from deepspeed.utils import logger

    arguments.hf_deepspeed_config.trainer_config_finalize(arguments, model, arguments.max_steps)
    logger.setLevel(arguments.get_process_log_level())
    return ZeroRun(model, plugin.zero_stage, str(arguments.optim.value))


def check_saved_alike(checkpoint: Path, *, under_zero: bool) -> None:
    """Raise `RunError` where one of run and checkpoint is DeepSpeed's, and the other is not."""
    if (checkpoint / FOLDER / STEP).exists() == under_zero:
        return
    saved, go_on = ("without", "without") if under_zero else ("under", "with")
    raise RunError(
        f"{checkpoint} was saved {saved} DeepSpeed",
        remedy=f"resume {go_on} distributed.deepspeed, or start again with --overwrite",
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


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy that shares no memory: what was gathered is used again for the next weight."""
    return tensor.detach().to("cpu", copy=True).contiguous()
