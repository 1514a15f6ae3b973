"""Floating-point operations of one micro-batch, counted as multiplications and additions."""

from dataclasses import dataclass

from yrunner.models.size import WeightCounts


@dataclass(frozen=True)
class Attention:
    """What the attention of a model computes besides its matrices."""

    layers: int
    width: int
    """Heads times the size of a head."""


@dataclass(frozen=True)
class Operations:
    """Operations of one micro-batch."""

    forward: int
    backward: int
    recomputed: int
    """Of gradient checkpointing."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.forward + self.backward + self.recomputed


def count_operations(
    counts: WeightCounts,
    attention: Attention,
    *,
    rows: int,
    length: int,
    targets: int,
    trains_head: bool,
    recomputes: bool = False,
) -> Operations:
    """A micro-batch of `rows` full rows of `length` tokens, `targets` of them learned from.

    A matrix costs two operations per number and token: forward, for the gradient of its input, and
    once more where it is trained (Kaplan et al., 2020, https://arxiv.org/abs/2001.08361). A token
    looks at those before it, half a row on average. The head sees targets only, and its gradient
    is found in the forward pass (losses/chunks.py).
    """
    tokens = rows * length
    matrices = 2 * tokens * counts.in_layers
    looking = 2 * 2 * tokens * (length + 1) // 2 * attention.width * attention.layers
    head = 2 * targets * counts.head
    layers = matrices + looking
    gradients = matrices + 2 * looking + 2 * tokens * counts.trained_in_layers
    return Operations(
        forward=layers + head * (3 if trains_head else 2),
        backward=gradients,
        recomputed=layers if recomputes else 0,
    )
