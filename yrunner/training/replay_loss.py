"""Regularisers: a loss beside that of the training rows that holds the model to its base."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from yrunner.data.batching.collate import BatchLayout, collate, one_per_row
from yrunner.data.batching.replay_rows import KeepPlan
from yrunner.data.conversation import TokenizedExample
from yrunner.losses.fused_head import measure_targets
from yrunner.losses.kl import measure_divergence
from yrunner.scoring.base_predictions import CachedPredictions, predictions_of_base, to_device

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


@dataclass(frozen=True)
class MicroBatch:
    """Position of a micro-batch in the run."""

    update: int
    """Counted from 0."""
    number: int
    """Of the micro-batches of the update on all processes, from 0."""
    size: int
    """Its size in rows."""
    at_once: int = 1
    """World size."""


class KeptMean:
    """The mean of what was added since the last record; see rng_snapshot.py for its attributes."""

    def __init__(self) -> None:
        self.sums_2: Tensor | None = None
        """Total and number."""

    def add(self, total: Tensor, number: int) -> None:
        """Add a sum over `number` values."""
        found_2 = torch.stack([total.detach().double(), total.new_tensor(number).double()])
        self.sums_2 = found_2 if self.sums_2 is None else self.sums_2.to(found_2.device) + found_2

    def take(self, reduce: Reduce) -> float:
        """The mean over all ranks; resets the sums."""
        assert self.sums_2 is not None, "nothing was added"
        total, number = reduce(self.sums_2).tolist()
        self.sums_2 = None
        return total / max(number, 1)

    def state_dict(self) -> dict[str, Any]:
        """What no record has yet."""
        return {"sums": None if self.sums_2 is None else self.sums_2.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state["sums"] is not None:
            self.sums_2 = torch.tensor(state["sums"], dtype=torch.float64)


class Regulariser(Protocol):
    """A loss that is added to that of each micro-batch, and its mean for the log."""

    mean: KeptMean
    runs_model: bool
    """Whether it runs its own forward pass."""

    def loss(self, model: Any, called: Any, micro: MicroBatch) -> Tensor | None:
        """The part of a micro-batch in the update's loss, None where it has none.

        `called` is `model` as accelerate has wrapped it.
        """

    @property
    def logged_as(self) -> str:
        """The name of the mean in metrics.jsonl."""


@dataclass
class HeldRows:
    """Rows that take the last places of each update, and are held to the base or learned as text.

    Their loss is the sum over their targets, divided once by the number of those in the whole
    update, times `strength`. So neither accumulation nor the size of a micro-batch changes it.
    """

    examples: Sequence[TokenizedExample]
    plan: KeepPlan
    lanes: int
    """Training rows of an update, which come before these."""
    strength: float
    by_text: bool
    tops: CachedPredictions | None
    """Predictions of the base; None: run the model with its adapter off."""
    pad_token_id: int
    layout: BatchLayout = one_per_row
    mean: KeptMean = field(default_factory=KeptMean)
    runs_model = True

    @property
    def logged_as(self) -> str:
        """Mean loss, or mean divergence, of a kept target."""
        return "keep_text_loss" if self.by_text else "keep_divergence"

    def loss(self, model: Any, called: Any, micro: MicroBatch) -> Tensor | None:
        """See `Regulariser`."""
        chosen = self.examples_of(micro)
        if not (chosen or self._another_process_has_some(micro)):
            return None
        total = self._total(model, called, chosen)
        self.mean.add(total, sum(int(self.plan.num_targets_E[example]) for example in chosen))
        return self.strength * total / self.plan.count_targets(micro.update)

    def _another_process_has_some(self, micro: MicroBatch) -> bool:
        """Then this one takes part, too: ZeRO-3 gathers weights from all of them at each call."""
        last = micro.number - micro.number % micro.at_once + micro.at_once
        return last * micro.size > self.lanes

    def examples_of(self, micro: MicroBatch) -> list[int]:
        """The kept examples of a micro-batch."""
        first = micro.number * micro.size - self.lanes
        rows = self.plan.rows(micro.update)[max(0, first) : max(0, first + micro.size)]
        return [example for row in rows for example in row]

    def _total(self, model: Any, called: Any, chosen: Sequence[int]) -> Tensor:
        examples = [self.examples[index] for index in chosen]
        batch = to_device(collate(examples, self.pad_token_id, self.layout), model.device)
        if self.by_text:
            return measure_targets(called, batch).weighted
        rows = self.layout([len(example.input_ids) for example in examples]) if examples else []
        # Targets come row by row, as the layout has placed their examples.
        placed = [chosen[place] for row in rows for place in row]
        base = predictions_of_base(model, batch, placed, self.tops)
        return measure_divergence(called, batch, base).total
