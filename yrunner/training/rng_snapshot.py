"""The random generators and running sums before an update, restored when it is aborted."""

import random
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch


@runtime_checkable
class Stateful(Protocol):
    """A running sum that goes into a checkpoint.

    As torch.distributed.checkpoint defines it, which takes half a second to import.
    """

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` restores."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class Snapshot:
    """The random generators and the running sums, as they are when this is made.

    Weights and optimizer are not in it: they move only at the very end of an update.
    `sums` are objects whose attributes are replaced, never changed, when something is added.
    """

    def __init__(self, sums: Iterable[Any] = ()) -> None:
        self._sums = [(each, dict(vars(each))) for each in sums]
        self._generators = random_states()

    def restore(self) -> None:
        """Restore everything."""
        for each, attributes in self._sums:
            vars(each).clear()
            vars(each).update(attributes)
        set_random_states(self._generators)


def random_states() -> dict[str, Any]:
    """The states of all random generators of this process."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_states(states: dict[str, Any]) -> None:
    """Set them to what `random_states` gave back, here or on another machine."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
