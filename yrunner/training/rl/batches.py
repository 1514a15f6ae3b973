"""The micro-batches of an rl run: a cycle of answers is collected, then learned from.

The answers of a cycle, with everything that was found out about them, are part of a checkpoint: a
resumed run goes on in the midst of a cycle.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch

from yrunner.data.batching.batches import Batch, Batches
from yrunner.data.batching.plan import Plan
from yrunner.data.batching.rollouts import (
    Rollout,
    RolloutExample,
    RolloutPlan,
    as_example,
    collate_rollouts,
    longest_example,
)
from yrunner.data.batching.token_batches import Slice, SlicedRow
from yrunner.data.conversation import TokenizedExample
from yrunner.data.dataset.prompts import PromptRow
from yrunner.recipe.schema.recipe import PolicyLoss
from yrunner.recipe.schema.rl import PpoLoss, RolloutSection
from yrunner.training.rl.collect import Collector, rewards_tensor, settings_of

Watch = Callable[[int, Sequence[tuple[Rollout, PromptRow]]], None]
"""Called with a cycle and its answers, once they are collected."""


class RolloutBuffer:
    """The answers of the cycle that is learned from; part of every checkpoint."""

    def __init__(self) -> None:
        self.cycle: int | None = None
        self.rollouts: list[Rollout] = []
        self.by_number: dict[int, Rollout] = {}
        self.num_replaced = 0
        """Other answers of the cycle, which `rollout.resample` has replaced."""
        self.seconds = 0.0
        """That it took to collect them."""

    def fill(
        self, cycle: int | None, rollouts: list[Rollout], seconds: float, num_replaced: int
    ) -> None:
        """Replace them by those of another cycle."""
        self.cycle, self.rollouts, self.seconds = cycle, rollouts, seconds
        self.num_replaced = num_replaced
        self.by_number = {each.number: each for each in rollouts}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "cycle": self.cycle,
            "rollouts": [asdict(each) for each in self.rollouts],
            "seconds": self.seconds,
            "num_replaced": self.num_replaced,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        rollouts = [Rollout(**each) for each in state["rollouts"]]
        # Those of an older version had none.
        replaced = state.get("num_replaced", 0)
        self.fill(state["cycle"], rollouts, state["seconds"], replaced)


class RolloutRows:
    """The rows of the plan: the answers of this cycle, and for any other the longest possible."""

    def __init__(
        self,
        prompts: Sequence[PromptRow],
        buffer: RolloutBuffer,
        *,
        generations: int,
        longest: int,
        has_reference: bool,
        has_critic: bool = False,
    ) -> None:
        self.prompts = prompts
        self.buffer = buffer
        self.generations, self.longest = generations, longest
        self.has_reference, self.has_critic = has_reference, has_critic
        self.is_first_pass = True

    def __len__(self) -> int:
        return len(self.prompts) * self.generations

    def prompt(self, number: int) -> PromptRow:
        """The prompt of an answer."""
        return self.prompts[number // self.generations]

    def __getitem__(self, one: Slice) -> RolloutExample:
        number, _ = one
        rollout = self.buffer.by_number.get(number)
        if rollout is None:
            known = {"reference": self.has_reference, "critic": self.has_critic}
            return longest_example(self.prompt(number), self.longest, **known)
        return as_example(self.prompt(number), rollout, is_first_pass=self.is_first_pass)

    def __getitems__(self, rows: Sequence[SlicedRow]) -> list[RolloutExample]:
        """All rows of a micro-batch."""
        return [self[one] for row in rows for one in row]


class RolloutBatches(Batches):
    """Collects the answers of each cycle, and cuts them into micro-batches."""

    collector: Collector
    """Set when there is a model to write them."""

    def __init__(
        self,
        plan: Plan,
        train: Sequence[PromptRow],
        validation: Sequence[PromptRow],
        pad_token_id: int,
        rank: int = 0,
        num_ranks: int = 1,
        *,
        loss: PolicyLoss,
        rollout: RolloutSection,
    ) -> None:
        """See `Batches`; `plan` is a `RolloutPlan`."""
        super().__init__(plan, (), (), pad_token_id, rank, num_ranks)
        self.loss = loss
        self.buffer = RolloutBuffer()
        self.train = RolloutRows(
            train,
            self.buffer,
            generations=rollout.generations,
            longest=rollout.max_new_tokens,
            has_reference=settings_of(loss).beta > 0,
            has_critic=isinstance(loss, PpoLoss),
        )
        self.validation = validation
        self.watchers: list[Watch] = []
        self.before_collecting: list[Callable[[], None]] = []

    def of_updates(self, first: int) -> Iterator[Batch]:
        """See `Batches`; ends where a signal interrupts the collecting."""
        assert isinstance(self.plan, RolloutPlan)
        for update, rows in islice(enumerate(self.plan.updates()), first, None):
            cycle, number = divmod(update, self.plan.passes)
            if self.buffer.cycle != cycle and not self._collect(cycle, rows):
                return
            self.train.is_first_pass = number == 0
            for micro_batch in self._micro_batches():
                yield self.collate(self.train.__getitems__(micro_batch))

    def _collect(self, cycle: int, rows: Sequence[SlicedRow]) -> bool:
        """Fill the buffer; whether that was not interrupted."""
        for action in self.before_collecting:
            action()
        asked = list(dict.fromkeys(self.plan.data_row(number) for row in rows for number, _ in row))
        found = self.collector.collect(cycle, asked, self._other_prompts(cycle, asked))
        if found is None:
            return False
        self.buffer.fill(cycle, found.rollouts, found.seconds, len(found.replaced))
        every = [*found.rollouts, *found.replaced]
        pairs = [(each, self.train.prompt(each.number)) for each in every]
        for watch in self.watchers:
            watch(cycle, pairs)
        return True

    def _other_prompts(self, cycle: int, asked: Sequence[int]) -> Iterator[int]:
        """The prompts that a cycle does not ask, in an order that only its number decides."""
        order = sorted(set(range(len(self.train.prompts))) - set(asked))
        random.Random(f"{self.plan.seed} resampled {cycle}").shuffle(order)
        yield from order

    def _micro_batches(self) -> list[list[SlicedRow]]:
        """This rank's micro-batches, sorted by length; answers that change nothing are left out."""
        learned = [each for each in self.buffer.rollouts if each.is_learned]
        lengths = {
            each.number: len(self.train.prompt(each.number).input_ids) + len(each.ids)
            for each in learned
        }
        rows: list[SlicedRow] = [
            ((number, 0),) for number in sorted(lengths, key=lambda number: -lengths[number])
        ]
        size = self.plan.micro_batch_size
        starts = range(0, self.plan.num_micro_batches * size, size)
        return [rows[start : start + size] for start in starts][self.rank :: self.num_ranks]

    def of_validation(self) -> Iterator[Batch]:
        """An answer to each validation prompt: rewards, lengths and ends, of this rank's part."""
        numbers = range(self.rank, len(self.validation), self.num_ranks)
        size = self.collector.rollout.batch_size
        with self.collector.whole_model():
            for start in range(0, len(numbers), size):
                chosen = numbers[start : start + size]
                found = self.collector.validate(chosen, [self.validation[at] for at in chosen])
                if found is None:
                    return
                yield {
                    "reward_S": rewards_tensor(found),
                    "num_tokens_S": torch.tensor([each.num_tokens for each in found]),
                    "is_truncated_S": torch.tensor([each.is_truncated for each in found]),
                }

    def largest_validation(self) -> Batch | None:
        """None: answers are written when they are needed."""
        return None

    def collate(self, examples: Sequence[RolloutExample]) -> Batch:
        """See `collate_rollouts`."""
        return collate_rollouts(examples, self.pad_token_id, self.layout)

    def examples_of(self, examples: Sequence[RolloutExample]) -> list[TokenizedExample]:
        """Prompts with their answers."""
        return [each.example for each in examples]
