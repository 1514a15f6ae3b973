"""What the other rows of a corpus say in like places: the model's memory of them judges each row.

A nearest-neighbour language model (Khandelwal et al., 2020, https://arxiv.org/abs/1911.00172): the
hidden state before a target says what the model made of all that stands before it. Where hidden
states are alike, texts usually go on alike. So a fact that several rows state, and one states
otherwise, is seen without any training.
"""

# N = targets of a row, M = targets that are remembered, Q = targets that are asked for at once,
# C = size of a context, K = neighbours

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from yrunner.data.conversation import TokenizedExample
from yrunner.scoring.measure import TokenScores

NEIGHBOURS = 8
"""The nearest contexts that have a say."""
TEMPERATURE = 0.05
"""A neighbour whose cosine is lower by this has an e-th of the say."""
OWN_LIKENESS = 0.8
"""The model's own prediction counts as one neighbour of this cosine: far ones change nothing."""
MOST_REMEMBERED = 2**21
"""Targets that are kept to compare with, half a gigabyte; of a larger corpus whole rows at random.
"""
MOST_COMPARED = 2**14
"""Contexts that one is compared with; of more, some that are spread evenly over them."""
ASKED_AT_ONCE = 2**15
"""Targets of several rows that are looked up together."""
BLOCK = 2**22
"""Cosines that are in memory at once."""
NOTHING = -1
"""Of a target of which no other token is likelier by its neighbours."""


@dataclass(frozen=True)
class Lookup:
    """What other rows say about the targets of one example, in their order."""

    loss_N: Tensor
    """Cross-entropy in nats, of the neighbours and the model together."""
    told_N: Tensor
    """Id of the token that more than half of the say is for, if that is not the target's; else -1.
    """


@dataclass(frozen=True)
class _Places:
    """Some targets of a corpus, each with what stands before it and what it is."""

    context_MC: Tensor
    """As measured; float16."""
    previous_M: Tensor
    """Id of the token before it."""
    target_M: Tensor
    group_M: Tensor
    """Number of the row; that of its first copy."""
    loss_M: Tensor
    """By the model alone."""


def look_up(
    examples: Sequence[TokenizedExample],
    scores: Sequence[TokenScores],
    groups: Sequence[str],
    seed: int,
) -> Iterator[Lookup]:
    """What the neighbours of each example's targets say, in the order of the examples.

    `scores` have contexts. Examples of equal `groups`, which are the parts and the copies of one
    row, are no neighbours: a copy would confirm a fault. Neighbours follow the same token, which
    like contexts nearly always do; so most pairs need not be compared. Where a target has no
    neighbour, the model's own loss stands.
    """
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    group_E = [numbers[group] for group in groups]
    counts = [len(example.target_positions) for example in examples]
    memory = _Memory(_gather(examples, scores, group_E, _remembered(counts, seed)))
    for block in _blocks(counts):
        asked = _gather(examples, scores, group_E, block)
        loss_Q, told_Q = memory.look_up(asked)
        sizes = [counts[index] for index in block]
        parts = zip(torch.split(loss_Q, sizes), torch.split(told_Q, sizes), strict=True)
        yield from (Lookup(loss_N, told_N) for loss_N, told_N in parts)


class _Memory:
    """All that is remembered, in the order of the token before."""

    def __init__(self, places: _Places) -> None:
        order_M = places.previous_M.argsort(stable=True)
        self.centre_C = _mean(places.context_MC)
        self.context_MC = places.context_MC[order_M]
        self.target_M = places.target_M[order_M]
        self.group_M = places.group_M[order_M]
        self.previous_M = places.previous_M[order_M].numpy()

    def look_up(self, asked: _Places) -> tuple[Tensor, Tensor]:
        """Losses and told tokens, both of shape [Q]."""
        loss_Q = asked.loss_M.clone()
        told_Q = torch.full_like(asked.target_M, NOTHING)
        order_Q = asked.previous_M.argsort(stable=True)
        tokens, sizes = np.unique(asked.previous_M.numpy(), return_counts=True)
        for token, same_Q in zip(tokens, torch.split(order_Q, sizes.tolist()), strict=True):
            bucket_B = self._bucket(token)
            if not len(bucket_B):
                continue
            contexts_BC = self._direction(self.context_MC[bucket_B])
            for part_Q in torch.split(same_Q, max(1, BLOCK // len(bucket_B))):
                cosine_QB = self._direction(asked.context_MC[part_Q]) @ contexts_BC.T
                own_QB = asked.group_M[part_Q, None] == self.group_M[bucket_B]
                cosine_QB.masked_fill_(own_QB, -torch.inf)
                cosine_QK, nearest_QK = cosine_QB.topk(min(NEIGHBOURS, len(bucket_B)), dim=1)
                said_QK = self.target_M[bucket_B[nearest_QK]]
                figures = (said_QK, cosine_QK, asked.target_M[part_Q], asked.loss_M[part_Q])
                loss_Q[part_Q], told_Q[part_Q] = _ask(*figures)
        return loss_Q, told_Q

    def _bucket(self, token: int) -> Tensor:
        """Places that are remembered after a token."""
        first, behind = np.searchsorted(self.previous_M, [token, token + 1]).tolist()
        step = max(1, -(-(behind - first) // MOST_COMPARED))
        return torch.arange(first, behind, step)

    def _direction(self, context_QC: Tensor) -> Tensor:
        """What sets a context apart from the mean of all: hidden states mostly point one way."""
        return normalize(context_QC.float() - self.centre_C, dim=1)


def _ask(
    said_QK: Tensor, cosine_QK: Tensor, target_Q: Tensor, loss_Q: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of each target by its neighbours and the model, and what they say instead."""
    say_QK = ((cosine_QK.double() - 1) / TEMPERATURE).exp()
    own = np.exp((OWN_LIKENESS - 1) / TEMPERATURE)
    whole_Q = say_QK.sum(dim=1) + own
    agreed_Q = (say_QK * (said_QK == target_Q[:, None])).sum(dim=1)
    # A loss that is no number stays one: it is for the scores to bound it.
    probability_Q = (agreed_Q + own * (-loss_Q.double()).exp()) / whole_Q
    # Of neighbours that say the same, each counts what all of them have.
    shared_QK = (say_QK[:, None] * (said_QK[:, None] == said_QK[:, :, None])).sum(dim=2)
    most_Q, place_Q = shared_QK.max(dim=1)
    told_Q = said_QK.gather(1, place_Q[:, None])[:, 0]
    is_told_Q = (most_Q > whole_Q / 2) & (told_Q != target_Q)
    found_Q = torch.where(torch.isfinite(loss_Q), -probability_Q.log(), loss_Q.double())
    return found_Q.to(loss_Q.dtype), torch.where(is_told_Q, told_Q, NOTHING)


def _gather(
    examples: Sequence[TokenizedExample],
    scores: Sequence[TokenScores],
    group_E: Sequence[int],
    chosen: Sequence[int],
) -> _Places:
    """The targets of some examples, one behind the other."""
    contexts, losses = [], []
    previous: list[int] = []
    targets: list[int] = []
    groups: list[int] = []
    for index in chosen:
        scored, ids = scores[index], examples[index].input_ids
        assert scored.context_NC is not None, "contexts have been measured"
        contexts.append(scored.context_NC)
        losses.append(scored.loss_N)
        positions = examples[index].target_positions
        previous += [ids[position - 1] for position in positions]
        targets += [ids[position] for position in positions]
        groups += [group_E[index]] * len(positions)
    return _Places(
        context_MC=torch.cat(contexts) if contexts else torch.empty(0, 1),
        previous_M=torch.tensor(previous, dtype=torch.long),
        target_M=torch.tensor(targets, dtype=torch.long),
        group_M=torch.tensor(groups, dtype=torch.long),
        loss_M=torch.cat(losses) if losses else torch.empty(0),
    )


def _remembered(counts: Sequence[int], seed: int) -> list[int]:
    """The examples that are remembered: all, or as many as there is room for, at random."""
    if sum(counts) <= MOST_REMEMBERED:
        return list(range(len(counts)))
    drawn: NDArray[np.intp] = np.random.default_rng(seed).permutation(len(counts))
    room = np.cumsum([counts[index] for index in drawn]) <= MOST_REMEMBERED
    return sorted(drawn[room].tolist())


def _blocks(counts: Sequence[int]) -> Iterator[range]:
    """Neighbouring examples that are looked up together."""
    first = 0
    ends = list(accumulate(counts))
    done = 0
    for index, end in enumerate(ends):
        if end - done >= ASKED_AT_ONCE or index + 1 == len(ends):
            yield range(first, index + 1)
            first, done = index + 1, end


def _mean(context_MC: Tensor) -> Tensor:
    """The mean context, in parts: all of them in float32 would need twice their memory."""
    total_C = torch.zeros(context_MC.shape[1], dtype=torch.float64)
    for part_MC in torch.split(context_MC, ASKED_AT_ONCE):
        total_C += part_MC.double().sum(dim=0)
    return (total_C / max(1, len(context_MC))).float()
