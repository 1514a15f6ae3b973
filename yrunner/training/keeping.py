"""What holds the model back while it learns: a loss beside that of the field."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from yrunner.data.collate import collate
from yrunner.data.conversation import TokenizedExample
from yrunner.data.keep_plan import KeepPlan
from yrunner.data.layouts import Layout, one_per_row
from yrunner.losses.fused import measure_targets
from yrunner.losses.held import measure_divergence
from yrunner.scoring.base_answers import KeptTops, side_of_base, to_device


@dataclass(frozen=True)
class Micro:
    """Which micro-batch is being learned from."""

    update: int
    """Counted from 0."""
    number: int
    """Of the update's micro-batches, from 0."""
    size: int
    """Rows that fit into it."""


class Keeping(Protocol):
    """A loss that is added to that of each micro-batch; what is logged of it."""

    def loss(self, model: Any, called: Any, micro: Micro) -> Tensor | None:
        """The part of a micro-batch in the update's loss, None where it has none.

        `called` is `model` as Trainer has wrapped it.
        """

    def drain(self) -> dict[str, float]:
        """What is logged of everything since the last call."""


@dataclass
class HeldRows:
    """Rows that take the last places of each update, and are held to the base or learned as text.

    Their loss is the sum over their targets, divided once by the number of those in the whole
    update, times `strength`. So neither accumulation nor the size of a micro-batch changes it.
    """

    examples: Sequence[TokenizedExample]
    plan: KeepPlan
    lanes: int
    """Rows of the field in an update, which come before these."""
    strength: float
    by_text: bool
    tops: KeptTops | None
    """What the base predicts for them; None: the model is asked with its adapter off."""
    pad_token_id: int
    layout: Layout = one_per_row
    sums: list[Tensor] = field(default_factory=list)
    num_targets: int = 0

    def loss(self, model: Any, called: Any, micro: Micro) -> Tensor | None:
        """See `Keeping`."""
        chosen = self.examples_of(micro)
        if not chosen:
            return None
        total = self._total(model, called, chosen)
        self.sums.append(total.detach())
        self.num_targets += sum(int(self.plan.num_targets_E[example]) for example in chosen)
        return self.strength * total / self.plan.count_targets(micro.update)

    def examples_of(self, micro: Micro) -> list[int]:
        """The kept examples of a micro-batch."""
        first = micro.number * micro.size - self.lanes
        rows = self.plan.rows(micro.update)[max(0, first) : max(0, first + micro.size)]
        return [example for row in rows for example in row]

    def drain(self) -> dict[str, float]:
        """The mean loss of a kept target, by the name of what it is."""
        if not self.sums:
            return {}
        mean = float(torch.stack(self.sums).double().sum()) / self.num_targets
        self.sums, self.num_targets = [], 0
        return {"keep_text_loss" if self.by_text else "keep_divergence": mean}

    def _total(self, model: Any, called: Any, chosen: Sequence[int]) -> Tensor:
        examples = [self.examples[index] for index in chosen]
        batch = to_device(collate(examples, self.pad_token_id, self.layout), model.device)
        if self.by_text:
            return measure_targets(called, batch).weighted
        rows = self.layout([len(example.input_ids) for example in examples])
        # Targets come row by row, as the layout has placed their examples.
        placed = [chosen[place] for row in rows for place in row]
        side = side_of_base(model, batch, placed, self.tops)
        return measure_divergence(called, batch, side).total
