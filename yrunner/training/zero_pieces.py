"""What a process keeps under ZeRO-3: pieces of weights and of the optimizer, also on a disk.

DeepSpeed reads from a disk what belongs to a whole group of weights, and its own functions do so
for every weight of it anew. Here a group is read once, and written once where it has changed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from yrunner.ranks import num_ranks, this_rank

WEIGHT = "weight"
"""The key of a weight itself, in float32; the others are the optimizer's own."""


class Pieces:
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
