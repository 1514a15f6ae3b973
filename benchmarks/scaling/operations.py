"""Floating-point operations of one micro-batch; a multiply-add counts as two."""

from dataclasses import dataclass

from yrunner.models.size import WeightCounts


@dataclass(frozen=True)
class Attention:
    """Size of the attention scores and values, which have no matrix."""

    layers: int
    width: int
    """Number of heads times head dimension."""


@dataclass(frozen=True)
class Operations:
    """Operations of one micro-batch."""

    forward: int
    backward: int
    recomputed: int
    """By gradient checkpointing."""

    @property
    def total(self) -> int:
        """Sum of all operations."""
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
    """Count the operations of `rows` full rows of `length` tokens, `targets` of them targets.

    A matrix costs two operations per weight and token: in the forward pass, for the gradient of its
    input, and again where it is trained (Kaplan et al., 2020, https://arxiv.org/abs/2001.08361). A
    token attends to half a row on average. The head sees targets only, and computes its gradient in
    the forward pass.
    """
    tokens = rows * length
    matrices = 2 * tokens * counts.in_layers
    attending = 2 * 2 * tokens * (length + 1) // 2 * attention.width * attention.layers
    head = 2 * targets * counts.head
    layers = matrices + attending
    gradients = matrices + 2 * attending + 2 * tokens * counts.trained_in_layers
    return Operations(
        forward=layers + head * (3 if trains_head else 2),
        backward=gradients,
        recomputed=layers if recomputes else 0,
    )
