"""Memory for the logits of a chunk that is kept from batch to batch."""

import torch
from torch import Tensor


class Space:
    """Matrices that are used again: on a processor the pages of new memory have to be brought in.

    That takes longer than a pass over it. On a GPU torch keeps memory itself, and nothing is kept
    here.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A matrix of any content; what was taken under this name before is used up."""
        size = shape[0] * shape[1]
        kept = self.kept.get(name)
        if kept is None or kept.dtype != dtype or kept.numel() < size:
            # Let go of the old one first.
            self.kept.pop(name, None)
            kept = like.new_empty(size, dtype=dtype)
            if kept.device.type == "cpu":
                self.kept[name] = kept
        return kept[:size].view(shape)
