"""Add up the bytes of all tensors that are alive while a weightless model computes.

Its weights are fake tensors, which have shapes and no values, and so is all that is computed from
them. The micro-batch is real: code that looks at its values (is there padding, which columns have
targets) goes the way that it goes in training.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

Kind = Literal["weights", "gradients", "optimizer", "activations", "copies"]
"""Copies are those of weights in another dtype, as autocast makes them: activations of a kind."""

VALUES_NEEDED = (DataDependentOutputException, DynamicOutputShapeException)
"""What an operation on fake tensors raises when its result depends on their values."""

REAL_UP_TO = 2**20
"""Elements of the largest real result. Ids and positions are smaller; masks of every token
against every other, and the identity matrix of DoRA, need no values."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, every new tensor counts as an activation until it is assigned."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake_mode = fake_mode
        self._storages: dict[int, tuple[Kind, int]] = {}
        self.alive: Counter[Kind] = Counter()
        """Bytes of each kind right now."""
        self._most_activations: dict[int, int] = {}
        self._most_without_copies: dict[int, int] = {}

    def assign(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Count these tensors, whether known or new, as `kind`."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) in self._storages:
                self._forget(id(storage))
            else:
                weakref.finalize(storage, self._forget, id(storage)).atexit = False
            self._storages[id(storage)] = (kind, storage.nbytes())
            self.alive[kind] += storage.nbytes()

    def take_peaks(self) -> list[tuple[int, int]]:
        """Bytes of gradients, each with the most activations beside them since the last call."""
        peaks = list(self._most_activations.items())
        self._most_activations, self._most_without_copies = {}, {}
        return peaks

    def peaks_without_copies(self) -> list[tuple[int, int]]:
        """What `take_peaks` would give, were there no copies of weights; takes nothing."""
        return list(self._most_without_copies.items())

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and count what it made."""
        result = self._run(operation, FakeTensor in types, args, kwargs or {})
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.assign(
            (made for made in tensors if id(made.untyped_storage()) not in self._storages),
            "copies" if self._copies_a_weight(operation, args) else "activations",
        )
        gradients, activations = self.alive["gradients"], self.alive["activations"]
        for most, now in (
            (self._most_activations, activations + self.alive["copies"]),
            (self._most_without_copies, activations),
        ):
            most[gradients] = max(now, most.get(gradients, 0))
        return result

    def _copies_a_weight(self, operation: Any, args: Any) -> bool:
        if operation is not torch.ops.aten._to_copy.default:
            return False
        kind, _ = self._storages.get(id(args[0].untyped_storage()), (None, 0))
        return kind == "weights"

    def _run(self, operation: Any, has_fakes: bool, args: Any, kwargs: Any) -> Any:
        if has_fakes:
            return STAND_INS.get(operation, operation)(*args, **kwargs)
        # Fakes of its arguments, not the fake mode alone: that would compute on real ones.
        fakes = tree_map_only(Tensor, self._fake_mode.from_tensor, (args, kwargs))
        try:
            with self._fake_mode:
                fake_result = operation(*fakes[0], **fakes[1])
        except VALUES_NEEDED:
            return operation(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(fake_result) if isinstance(leaf, Tensor)]
        is_small = all(tensor.numel() <= REAL_UP_TO for tensor in tensors)
        return operation(*args, **kwargs) if is_small else fake_result

    def _forget(self, storage_id: int) -> None:
        kind, num_bytes = self._storages.pop(storage_id)
        self.alive[kind] -= num_bytes


@contextmanager
def quiet_failures() -> Iterator[None]:
    """Keep torch from logging the traceback of an operation that cannot be run without values."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


def _select(values: Tensor, indices: list[Tensor | None]) -> Tensor:
    """`values[indices]`, a real mask as positions: how many it picks is known only then."""
    positions: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
            positions.append(index)
        else:
            positions += index.nonzero().unbind(1)
    return torch.ops.aten.index.Tensor(values, positions)


def _norm(values: Tensor, order: float = 2) -> Tensor:
    return torch.linalg.vector_norm(values, order)


def _grouped_matmul(left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In bfloat16, the only dtype that fake tensors know for it, and back."""
    halves = (left.bfloat16(), right.bfloat16())
    return torch.ops.aten._grouped_mm.default(*halves, *args, **kwargs).to(left.dtype)


STAND_INS: dict[Any, Any] = {
    torch.ops.aten.index.Tensor: _select,
    torch.ops.aten.norm.Scalar: _norm,
    torch.ops.aten._grouped_mm.default: _grouped_matmul,
}
"""What fake tensors refuse, and how to come to a result of the same shape (torch 2.13)."""
