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
from yrunner.models.load import without_zero3
from yrunner.storage.run_dir import read_json, write_json

WEIGHT = "weight"
"""Key of the float32 weight itself; the other keys are optimizer state."""


class ZeroShards:
    """The ZeRO-3 shards of this rank, by DeepSpeed's parameter groups."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def groups(self) -> range:
        """The groups, equal on every rank."""
        return range(len(self.optimizer.fp16_groups))

    def weights(self, group: int) -> Sequence[nn.Parameter]:
        """The trained weights of a group."""
        weights: Sequence[nn.Parameter] = self.optimizer.fp16_groups[group]
        return weights

    @contextmanager
    def in_memory(self, group: int, *, changes: bool = False) -> Iterator[None]:
        """Keep the shards of a group in memory for the `with` block; write back what `changes`.

        Nothing moves unless the optimizer is offloaded to a disk.
        """
        from deepspeed.accelerator import get_accelerator

        get_accelerator().synchronize()
        optimizer = self.optimizer
        is_on_disk = optimizer._swappable_optimizer_subgroup(group)
        if is_on_disk:
            optimizer._optimizer_states_and_gradient_swap_in(group)
        yield
        if changes:
            # As after an update: refresh the working weights from the float32 ones.
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if is_on_disk and changes:
            optimizer._optimizer_states_and_gradient_swap_out(group)
        elif is_on_disk:
            optimizer._release_swap_buffers(group)

    def make_room(self, group: int, keys: Sequence[str], step: int) -> None:
        """Create the optimizer state that its first step would create, after `step` updates."""
        flat, inner = self.optimizer.fp32_partitioned_groups_flat[group], self.optimizer.optimizer
        inner.state[flat] = new_state(inner, flat, keys, step)

    def whole(self, weight: nn.Parameter, key: str) -> Tensor:
        """Gather a weight or its state. A collective call; the group is in memory."""
        piece = self._piece(weight, key).to(weight.device)
        whole: Tensor = self.optimizer._fp32_state_allgather(weight, piece)
        return whole

    def set(self, weight: nn.Parameter, key: str, value: Tensor) -> None:
        """Store this rank's shard of a full tensor; the group is in memory, with `changes`."""
        piece = self._piece(weight, key)
        # The last shard is padded with zeros.
        missing = piece.numel() * num_ranks() - value.numel()
        flat = nn.functional.pad(value.flatten(), (0, missing))
        piece.copy_(flat[piece.numel() * this_rank() : piece.numel() * (this_rank() + 1)])
        if key == WEIGHT and weight.numel():  # small ones are not sharded
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
    """The state of a torch optimizer for a flat shard before its first gradient."""
    where = flat.device if inner.defaults.get("fused") else "cpu"
    counter = torch.tensor(float(step), device=where)
    return {"step": counter} | {key: torch.zeros_like(flat) for key in keys}


FOLDER, STEP = "zero", "step.json"
SHARD_BYTES = 2**31
"""Rank 0 holds at most this much state, and one weight, while it writes."""
MOMENTS = {
    "adamw_torch": ("exp_avg", "exp_avg_sq"),
    "adamw_torch_fused": ("exp_avg", "exp_avg_sq"),
    "sgd": (),
}
"""Names of the optimizer state of a weight."""


class ZeroRun:
    """What training needs from DeepSpeed's engine beyond accelerate."""

    def __init__(self, model: Any, stage: int, optimizer: str) -> None:
        """`stage`: ZeRO stage; `optimizer`: its name in the recipe."""
        self.model = model
        self.stage = stage
        self.moments = MOMENTS[optimizer]
        self.engine: Any = None
        """Set when accelerate has wrapped the model."""

    @property
    def is_partitioned(self) -> bool:
        """Whether weights are sharded too (ZeRO-3), and gathered only while they are used."""
        return self.stage == 3

    def multiplied_when_stepping(self, loss: Tensor, factor: float) -> Tensor:
        """The loss to run backward, so that the gradient of the update is multiplied by `factor`.

        The step divides all gradients by the scale of the last loss, and clipping accounts for it.
        """
        scale = 1.0 / factor
        self.optimizer.override_loss_scale(scale)
        return loss / scale

    def run_backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to the update, before those of its micro-batch.

        DeepSpeed expects a backward pass after each forward pass. After two forward passes ZeRO-3
        would not release gathered weights, until all of them were on every device.
        """
        self.engine.set_gradient_accumulation_boundary(False)
        self.engine.backward(loss, scale_wrt_gas=False)

    def save(self, folder: Path, step: int) -> None:
        """Write the weights and the optimizer state after `step` updates.

        A collective call.
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
        """All weights to save, by name, trained ones in float32; empty except on rank 0.

        A collective call. Rank 0 holds all of them in main memory.
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

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Hold all weights in each process for the `with` block, as without ZeRO.

        Each process may then run the model as often as it needs to: answers end at their own
        lengths. Gradients must not be computed, nor weights changed. A collective call.
        """
        if not self.is_partitioned:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        offload = self.optimizer.parameter_offload
        weights = list(self.model.parameters())
        with GatheredParameters(weights), without_zero3():
            # As TRL does it: the hooks would release each weight after its use.
            for hook in (*offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            for weight in weights:
                weight.ds_active_sub_modules.clear()
            try:
                yield
            finally:
                offload._register_deepspeed_module(offload.module)

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer, which wraps torch's."""
        return self.engine.optimizer

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def _saved_frozen(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Frozen weights; none for an adapter, whose base is not saved."""
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
        """Every trained weight by name: gathered in float32, with its optimizer state."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.is_partitioned:
            pieces, names = ZeroShards(self.optimizer), self._names()
            for group in pieces.groups:
                with pieces.in_memory(group):
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
            with pieces.in_memory(group, changes=True):
                if moments:
                    pieces.make_room(group, moments, step)
                for weight in pieces.weights(group):
                    for key in (WEIGHT, *moments):
                        value = saved.read(f"{key} {names[weight]}").to(weight.device)
                        pieces.set(weight, key, value)

    def _load_whole(self, saved: "_Saved", moments: Sequence[str], step: int) -> None:
        """Load under stages 1 and 2, where only optimizer state and gradients are sharded."""
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
        """Let DeepSpeed find the optimizer state of each weight.

        It links states once, after the first step of the first group, when other groups have none.
        """
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()


def zero_run(accelerator: Accelerator, arguments: TrainingArguments, model: Any) -> ZeroRun | None:
    """DeepSpeed's part of a run, its configuration completed; None without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return None
    from deepspeed.utils import logger

    arguments.hf_deepspeed_config.trainer_config_finalize(arguments, model, arguments.max_steps)
    logger.setLevel(arguments.get_process_log_level())
    return ZeroRun(model, plugin.zero_stage, str(arguments.optim.value))


def check_saved_alike(checkpoint: Path, *, under_zero: bool) -> None:
    """Raise `RunError` if only one of run and checkpoint uses DeepSpeed."""
    if (checkpoint / FOLDER / STEP).exists() == under_zero:
        return
    saved, resumed = ("without", "without") if under_zero else ("under", "with")
    raise RunError(
        f"{checkpoint} was saved {saved} DeepSpeed",
        remedy=f"resume {resumed} distributed.deepspeed, or start again with --overwrite",
    )


class _Saved:
    """The tensors of all shards, by name."""

    def __init__(self, folder: Path) -> None:
        self.places: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self.places |= dict.fromkeys(file.keys(), path)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        with safe_open(self.places[name], framework="pt") as file:
            return file.get_tensor(name)


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy: the gathered buffer is reused for the next weight."""
    return tensor.detach().to("cpu", copy=True).contiguous()
