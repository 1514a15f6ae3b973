"""Where a run stands before an update: what a cut-off or tried update has to put back."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class Snapshot:
    """The random generators and the running sums, as they are when this is made.

    Weights and optimizer are not in it: they move only at the very end of an update.
    `sums` are objects whose attributes are replaced, never changed, when something is added.
    """

    def __init__(self, sums: Sequence[Any]) -> None:
        self._sums = [(each, dict(vars(each))) for each in sums]
        self._python, self._numpy = random.getstate(), np.random.get_state()
        self._torch = torch.get_rng_state()
        self._gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        """Bring everything back to how it was."""
        for each, attributes in self._sums:
            vars(each).clear()
            vars(each).update(attributes)
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._gpu is not None:
            torch.cuda.set_rng_state(self._gpu)
