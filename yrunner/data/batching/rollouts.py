"""Answers that the model wrote, as a plan, as examples, and as micro-batches.

A row of a `RolloutPlan` is one answer: number `prompt * generations + generation`. An update learns
from whole groups, but its micro-batches and ranks may split them: advantages come with the answers.
"""

# Shapes: S = answers of a micro-batch, N = their targets

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch

from yrunner.data.batching.answers import collate_with_owners
from yrunner.data.batching.collate import BatchLayout
from yrunner.data.batching.packing import Integers
from yrunner.data.batching.plan import Plan
from yrunner.data.batching.replay_rows import count_kept_beside_groups
from yrunner.data.batching.token_batches import SlicedRow
from yrunner.data.conversation import TokenizedExample
from yrunner.data.dataset.prompts import PromptRow
from yrunner.tokens import IGNORE_INDEX

BY_TOKEN = ("old", "reference", "values", "advantages", "returns")
"""What may be known of each token of an answer."""


@dataclass(frozen=True, eq=False)
class RolloutPlan(Plan):
    """The answers of every update; `num_groups` counts prompts."""

    generations: int = 1
    """Answers to each prompt."""
    passes: int = 1
    """Updates that learn from the same answers: a cycle."""

    @property
    def prompts_of_a_cycle(self) -> int:
        """Prompts whose answers fill an update."""
        return self.lanes // self.generations

    @property
    def rows_of_an_update(self) -> int:
        """Answers of a whole update: those of an epoch, if it has fewer."""
        return min(self.lanes, len(self.num_groups) * self.generations)

    @cached_property
    def updates_per_epoch(self) -> int:
        """Updates per epoch: those of the cycles that its prompts fill."""
        return -(-len(self.num_groups) // self.prompts_of_a_cycle) * self.passes

    def data_row(self, example: int) -> int:
        """The prompt of an answer."""
        return example // self.generations

    def _updates_of(self, epoch: int) -> Iterator[list[SlicedRow]]:
        order, size = self.example_order(epoch), self.prompts_of_a_cycle
        for start in range(0, len(order), size):
            answers: list[SlicedRow] = [
                ((prompt * self.generations + number, 0),)
                for prompt in order[start : start + size]
                for number in range(self.generations)
            ]
            yield from [answers] * self.passes

    def _count_tokens(self, row: SlicedRow) -> int:
        assert self.lengths is not None
        return sum(int(self.lengths[answer]) for answer, _ in row)


def make_rollout_plan(
    prompt_lengths: Sequence[int] | Integers,
    *,
    generations: int,
    max_new_tokens: int,
    passes: int,
    kept_share: float = 0.0,
    **plan: Any,
) -> RolloutPlan:
    """Plan a run over prompts; `plan` are fields of `Plan`.

    The lengths of the plan are the largest that its answers can have. `kept_share`: about this
    share of the rows of each update is left to replay rows, so that the rest are whole groups.
    """
    rows = plan["micro_batch_size"] * plan["num_micro_batches"]
    kept = count_kept_beside_groups(kept_share, rows, generations) if kept_share else 0
    lengths_A = np.repeat(np.asarray(prompt_lengths) + max_new_tokens, generations)
    made = RolloutPlan(
        num_groups=(1,) * len(prompt_lengths),
        token_batch=0,
        lengths=lengths_A,
        generations=generations,
        passes=passes,
        kept=kept,
        **plan,
    )
    assert made.lanes > 0 and made.lanes % generations == 0, "an update learns from whole groups"
    return made


@dataclass(frozen=True)
class Rollout:
    """An answer to a prompt, and what is learned from it."""

    number: int
    """Its row in the plan."""
    ids: list[int]
    """All tokens as written, with the end mark."""
    text: str
    num_tokens: int
    """Without the end mark."""
    is_truncated: bool
    scores: list[float | None]
    """Of each reward; None: no opinion."""
    reward: float | None = None
    """Their weighted sum, less penalties; None if no reward has an opinion."""
    advantage: float = 0.0
    fate: str = ""
    """`learned`; `masked`: it was cut off, and its tokens do not count; `unrated`: no reward has an
    opinion; `equal`: all rewards of its group are equal; `replaced`: so they were, and the answers
    to another prompt took its place."""
    is_learned: bool = False
    """Whether it changes the model; `unrated` and `equal` ones may be held to the reference."""
    share: float = 0.0
    """The part of each of its tokens in the loss of an update."""
    old: list[float] | None = None
    """Log-probability of each token as it was drawn; None if no later update needs it."""
    reference: list[float] | None = None
    """Log-probability of each token under the reference."""
    values: list[float] | None = None
    """What the critic expected before each token; None without one, as the following two."""
    advantages: list[float] | None = None
    """Of each token; `advantage` is then their mean."""
    returns: list[float] | None = None
    """What the critic should have expected before each token."""


@dataclass(frozen=True)
class RolloutExample:
    """A rollout with its prompt, as a micro-batch holds it."""

    number: int
    """Its row in the plan."""
    example: TokenizedExample
    advantage: float
    share: float
    old: Sequence[float] | None
    reference: Sequence[float] | None
    values: Sequence[float] | None
    advantages: Sequence[float] | None
    returns: Sequence[float] | None


def as_example(prompt: PromptRow, rollout: Rollout, *, is_first_pass: bool) -> RolloutExample:
    """A rollout as the update of a cycle sees it: the first compares the model with itself."""
    ids = [*prompt.input_ids, *rollout.ids]
    labels = [IGNORE_INDEX] * len(prompt.input_ids) + rollout.ids
    old = None if is_first_pass else rollout.old
    example = TokenizedExample(ids, labels, prompt.origin)
    by_token = {name: getattr(rollout, name) for name in BY_TOKEN if name != "old"}
    figures = rollout.advantage, rollout.share, old
    return RolloutExample(rollout.number, example, *figures, **by_token)


def longest_example(
    prompt: PromptRow, max_new_tokens: int, *, reference: bool, critic: bool = False
) -> RolloutExample:
    """The longest answer that a prompt can get, to try out what it costs."""
    token = prompt.input_ids[-1]
    rollout = Rollout(0, [token] * max_new_tokens, "", max_new_tokens, True, [])
    known = [0.0] * max_new_tokens
    rollout = replace(rollout, advantage=1.0, share=1.0 / max_new_tokens)
    if reference:
        rollout = replace(rollout, reference=known)
    if critic:
        rollout = replace(rollout, values=known, advantages=known, returns=known)
    return as_example(prompt, rollout, is_first_pass=True)


def collate_rollouts(
    rollouts: Sequence[RolloutExample], pad_token_id: int, layout: BatchLayout
) -> dict[str, torch.Tensor]:
    """What `collate_with_owners` makes of rollouts, and what the policy's loss reads.

    `advantage_S` and `share_S`; of BY_TOKEN, such as `old_N`, what is known, all float64; and
    `number_S`, the rows of the plan.
    """
    examples = [each.example for each in rollouts]
    batch = collate_with_owners(examples, pad_token_id, layout)
    batch["number_S"] = torch.tensor([each.number for each in rollouts], dtype=torch.long)
    batch["advantage_S"] = _float64([each.advantage for each in rollouts])
    batch["share_S"] = _float64([each.share for each in rollouts])
    # Targets come row by row, as the layout has placed their answers.
    answers = list(dict.fromkeys(batch["answer_N"].tolist()))
    for name in BY_TOKEN:
        known = [getattr(rollouts[answer], name) for answer in answers]
        if known and known[0] is not None:
            batch[f"{name}_N"] = _float64([*chain.from_iterable(known)])
    return batch


def _float64(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)
