"""Score each target by its nearest neighbours in the other rows of the corpus.

A nearest-neighbour language model (Khandelwal et al., 2020, https://arxiv.org/abs/1911.00172):
where the hidden states before two targets are similar, the texts usually continue alike. So a row
that contradicts several others is found without any training.
"""

# N = targets of a row, M = targets in the datastore, Q = queries, B = candidates of a query,
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
"""Nearest contexts that vote."""
TEMPERATURE = 0.05
"""A cosine lower by this divides the vote by e."""
OWN_COSINE = 0.8
"""The model's own prediction votes as a neighbour of this cosine; distant ones change nothing."""
MOST_STORED = 2**21
"""Targets in the datastore, half a gigabyte; of a larger corpus, random whole rows."""
MOST_CANDIDATES = 2**14
"""Contexts that a query is compared with; of more, an even selection."""
QUERIES_AT_ONCE = 2**15
"""Targets of several rows that are looked up together."""
COSINES_AT_ONCE = 2**22
"""Cosines in memory at once."""
NO_SUGGESTION = -1
"""Where the neighbours suggest no other token."""


@dataclass(frozen=True)
class Lookup:
    """Votes of other rows on the targets of one example, in their order."""

    loss_N: Tensor
    """Cross-entropy in nats of neighbours and model together."""
    suggested_N: Tensor
    """Id of the token with more than half of the votes, if it is not the target; else -1."""


@dataclass(frozen=True)
class _TargetTable:
    """Targets of several examples with their contexts."""

    context_MC: Tensor
    """Projected hidden states, float16, see measure.py."""
    previous_M: Tensor
    """Id of the token before the target."""
    target_M: Tensor
    group_M: Tensor
    """Number of the row's group."""
    loss_M: Tensor
    """Of the model alone."""


def look_up(
    examples: Sequence[TokenizedExample],
    scores: Sequence[TokenScores],
    groups: Sequence[str],
    seed: int,
) -> Iterator[Lookup]:
    """The lookup of each example, in order; `scores` must have contexts.

    Examples of one group, the parts and copies of a row, are not neighbours of each other: a copy
    would confirm a fault. Neighbours follow the same token as the target, as similar contexts
    nearly always do, which saves most comparisons. A target without neighbours keeps the model's
    loss.
    """
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    group_E = [numbers[group] for group in groups]
    counts = [len(example.target_positions) for example in examples]
    store = _Datastore(_gather(examples, scores, group_E, _choose_stored(counts, seed)))
    for block in _blocks(counts):
        loss_Q, suggested_Q = store.look_up(_gather(examples, scores, group_E, block))
        sizes = [counts[index] for index in block]
        parts = zip(torch.split(loss_Q, sizes), torch.split(suggested_Q, sizes), strict=True)
        yield from (Lookup(loss_N, suggested_N) for loss_N, suggested_N in parts)


class _Datastore:
    """Stored targets, sorted by the token before them."""

    def __init__(self, stored: _TargetTable) -> None:
        order_M = stored.previous_M.argsort(stable=True)
        self.centre_C = _mean(stored.context_MC)
        self.context_MC = stored.context_MC[order_M]
        self.target_M = stored.target_M[order_M]
        self.group_M = stored.group_M[order_M]
        self.previous_M = stored.previous_M[order_M].numpy()

    def look_up(self, asked: _TargetTable) -> tuple[Tensor, Tensor]:
        """Losses and suggested tokens, both of shape [Q]."""
        loss_Q = asked.loss_M.clone()
        suggested_Q = torch.full_like(asked.target_M, NO_SUGGESTION)
        order_Q = asked.previous_M.argsort(stable=True)
        tokens, sizes = np.unique(asked.previous_M.numpy(), return_counts=True)
        for token, same_Q in zip(tokens, torch.split(order_Q, sizes.tolist()), strict=True):
            candidate_B = self._candidates(token)
            if not len(candidate_B):
                continue
            contexts_BC = self._direction(self.context_MC[candidate_B])
            for part_Q in torch.split(same_Q, max(1, COSINES_AT_ONCE // len(candidate_B))):
                cosine_QB = self._direction(asked.context_MC[part_Q]) @ contexts_BC.T
                own_QB = asked.group_M[part_Q, None] == self.group_M[candidate_B]
                cosine_QB.masked_fill_(own_QB, -torch.inf)
                cosine_QK, nearest_QK = cosine_QB.topk(min(NEIGHBOURS, len(candidate_B)), dim=1)
                token_QK = self.target_M[candidate_B[nearest_QK]]
                figures = (token_QK, cosine_QK, asked.target_M[part_Q], asked.loss_M[part_Q])
                loss_Q[part_Q], suggested_Q[part_Q] = _vote(*figures)
        return loss_Q, suggested_Q

    def _candidates(self, token: int) -> Tensor:
        """Indices of stored targets that follow a token."""
        first, behind = np.searchsorted(self.previous_M, [token, token + 1]).tolist()
        step = max(1, -(-(behind - first) // MOST_CANDIDATES))
        return torch.arange(first, behind, step)

    def _direction(self, context_QC: Tensor) -> Tensor:
        """Direction of a context from the mean of all: raw hidden states mostly point one way."""
        return normalize(context_QC.float() - self.centre_C, dim=1)


def _vote(
    token_QK: Tensor, cosine_QK: Tensor, target_Q: Tensor, loss_Q: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of each target by its neighbours and the model, and the token they suggest."""
    vote_QK = ((cosine_QK.double() - 1) / TEMPERATURE).exp()
    own = np.exp((OWN_COSINE - 1) / TEMPERATURE)
    total_Q = vote_QK.sum(dim=1) + own
    agreed_Q = (vote_QK * (token_QK == target_Q[:, None])).sum(dim=1)
    # A loss that is not finite stays so; the scores bound it.
    probability_Q = (agreed_Q + own * (-loss_Q.double()).exp()) / total_Q
    # Neighbours with the same token pool their votes.
    shared_QK = (vote_QK[:, None] * (token_QK[:, None] == token_QK[:, :, None])).sum(dim=2)
    most_Q, best_Q = shared_QK.max(dim=1)
    suggested_Q = token_QK.gather(1, best_Q[:, None])[:, 0]
    is_other_Q = (most_Q > total_Q / 2) & (suggested_Q != target_Q)
    found_Q = torch.where(torch.isfinite(loss_Q), -probability_Q.log(), loss_Q.double())
    return found_Q.to(loss_Q.dtype), torch.where(is_other_Q, suggested_Q, NO_SUGGESTION)


def _gather(
    examples: Sequence[TokenizedExample],
    scores: Sequence[TokenScores],
    group_E: Sequence[int],
    chosen: Sequence[int],
) -> _TargetTable:
    """The targets of some examples, concatenated."""
    contexts, losses = [], []
    previous: list[int] = []
    targets: list[int] = []
    groups: list[int] = []
    for index in chosen:
        scored, ids = scores[index], examples[index].input_ids
        assert scored.context_NC is not None, "scores must have contexts"
        contexts.append(scored.context_NC)
        losses.append(scored.loss_N)
        positions = examples[index].target_positions
        previous += [ids[position - 1] for position in positions]
        targets += [ids[position] for position in positions]
        groups += [group_E[index]] * len(positions)
    return _TargetTable(
        context_MC=torch.cat(contexts) if contexts else torch.empty(0, 1),
        previous_M=torch.tensor(previous, dtype=torch.long),
        target_M=torch.tensor(targets, dtype=torch.long),
        group_M=torch.tensor(groups, dtype=torch.long),
        loss_M=torch.cat(losses) if losses else torch.empty(0),
    )


def _choose_stored(counts: Sequence[int], seed: int) -> list[int]:
    """The examples to store: all, or as many random ones as there is room for."""
    if sum(counts) <= MOST_STORED:
        return list(range(len(counts)))
    drawn: NDArray[np.intp] = np.random.default_rng(seed).permutation(len(counts))
    room = np.cumsum([counts[index] for index in drawn]) <= MOST_STORED
    return sorted(drawn[room].tolist())


def _blocks(counts: Sequence[int]) -> Iterator[range]:
    """Consecutive examples that are looked up together."""
    first = 0
    ends = list(accumulate(counts))
    done = 0
    for index, end in enumerate(ends):
        if end - done >= QUERIES_AT_ONCE or index + 1 == len(ends):
            yield range(first, index + 1)
            first, done = index + 1, end


def _mean(context_MC: Tensor) -> Tensor:
    """The mean context, in parts: a float32 copy of all would take twice their memory."""
    total_C = torch.zeros(context_MC.shape[1], dtype=torch.float64)
    for part_MC in torch.split(context_MC, QUERIES_AT_ONCE):
        total_C += part_MC.double().sum(dim=0)
    return (total_C / max(1, len(context_MC))).float()
