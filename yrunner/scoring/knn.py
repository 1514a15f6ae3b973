"""Score each target by its nearest neighbours in the other rows of the corpus.

A nearest-neighbour language model (Khandelwal et al., 2020, https://arxiv.org/abs/1911.00172):
where the hidden states before two targets are similar, the texts usually continue alike. So a row
that contradicts several others is found without any training. Where that predicts better, a
neighbour counts less if its row asks another question (see questions.py).

Losses are then compared with those of similar places: a gene's name is news in every row, the word
after it in none.
"""

# N = targets of a row, M = targets in the datastore, Q = queries, B = candidates of a query,
# C = size of a context, E = examples, K = neighbours, S = size of a question

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from yrunner.data.conversation import TokenizedExample
from yrunner.scoring.measure import TokenScores
from yrunner.scoring.questions import question_vectors
from yrunner.scoring.suspicious_spans import FEWEST_NATS, bounded_loss

NEIGHBOURS = 8
"""Nearest contexts that vote."""
TEMPERATURE = 0.05
"""A cosine lower by this divides the vote by e."""
OWN_COSINE = 0.8
"""The model's own prediction votes as a neighbour of this cosine; distant ones change nothing."""
QUESTION_SHARE = 0.5
"""A question of cosine 0 lowers the cosine of a neighbour by this, where questions help."""
OWN_COSINE_OF_QUESTIONS = 0.85
"""The same as `OWN_COSINE`, where questions help."""
TRIAL_SHARE = 0.1
"""Questions help where lowering cosines by this lowers the mean loss."""
PEERS = 64
"""Nearest contexts whose losses a loss is compared with."""
PEER_TEMPERATURE = 0.2
"""A cosine lower by this divides the weight of a peer by e."""
PRIOR = 2.0
"""All targets of the corpus together weigh as much as this many nearest peers."""
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
    against_N: Tensor
    """Index of the example whose vote for the suggested token is largest; -1 without one."""


class Neighbours:
    """The targets of a corpus as a datastore.

    Examples of one group, the parts and copies of a row, are not neighbours of each other: a copy
    would confirm a fault. Neighbours follow the same token as the target, as similar contexts
    nearly always do, which saves most comparisons.
    """

    def __init__(
        self,
        examples: Sequence[TokenizedExample],
        scores: Sequence[TokenScores],
        groups: Sequence[str],
        seed: int,
    ) -> None:
        """`scores` must have contexts; `groups`: that of each example."""
        self.examples = examples
        self.scores = scores
        self.counts = [len(example.target_positions) for example in examples]
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        self.group_E = torch.tensor([numbers[group] for group in groups], dtype=torch.long)
        self.question_ES = question_vectors(examples)
        self.stored = _choose_stored(self.counts, seed)
        self.store = _Datastore(self._gather(self.stored), self.group_E, self.question_ES)

    @cached_property
    def questions_help(self) -> bool:
        """Whether neighbours predict targets better if those of other questions count less.

        They do where questions name what they are about in the same words. Where one question is
        put in several languages, hidden states know better. Tried on some of the rows.
        """
        step = -(-sum(self.counts) // QUERIES_AT_ONCE) or 1
        asked = self._gather(range(0, len(self.counts), step))
        plain, tried = (
            bounded_loss(self.store.look_up(asked, share, OWN_COSINE)[0]).sum().item()
            for share in (0.0, TRIAL_SHARE)
        )
        return tried < plain

    def look_up(self, advance: Callable[[int], None] = lambda _: None) -> list[Lookup]:
        """The lookup of each example, in order. A target without neighbours keeps its loss.

        `advance` is called with numbers of examples.
        """
        share, own = (
            (QUESTION_SHARE, OWN_COSINE_OF_QUESTIONS) if self.questions_help else (0.0, OWN_COSINE)
        )
        found = []
        for block in _blocks(self.counts):
            votes = self.store.look_up(self._gather(block), share, own)
            sizes = [self.counts[index] for index in block]
            parts = zip(*(torch.split(figure_Q, sizes) for figure_Q in votes), strict=True)
            found += [Lookup(*figures) for figures in parts]
            advance(len(block))
        return found

    def compare(
        self, losses: Sequence[Tensor], advance: Callable[[int], None] = lambda _: None
    ) -> list[Tensor]:
        """How far each loss is above those at similar places, in standard deviations, [N] each.

        `losses`: of each example's targets in nats. The most similar places count most. Where few
        are similar, the whole corpus counts.
        """
        losses = [bounded_loss(loss_N) for loss_N in losses]
        loss_M = torch.cat([losses[index] for index in self.stored] or [torch.empty(0)])
        found: list[Tensor] = []
        for block in _blocks(self.counts):
            loss_Q = torch.cat([losses[index] for index in block])
            deviation_Q = self.store.compare(self._gather(block), loss_Q, loss_M)
            found += torch.split(deviation_Q, [self.counts[index] for index in block])
            advance(len(block))
        return found

    def _gather(self, chosen: Sequence[int]) -> "_TargetTable":
        """The targets of some examples, concatenated."""
        contexts, losses = [], []
        previous: list[int] = []
        targets: list[int] = []
        for index in chosen:
            scored, ids = self.scores[index], self.examples[index].input_ids
            assert scored.context_NC is not None, "scores must have contexts"
            contexts.append(scored.context_NC)
            losses.append(scored.loss_N)
            positions = self.examples[index].target_positions
            previous += [ids[position - 1] for position in positions]
            targets += [ids[position] for position in positions]
        counts = torch.tensor([self.counts[index] for index in chosen], dtype=torch.long)
        return _TargetTable(
            context_MC=torch.cat(contexts) if contexts else torch.empty(0, 1),
            previous_M=torch.tensor(previous, dtype=torch.long),
            target_M=torch.tensor(targets, dtype=torch.long),
            example_M=torch.tensor(chosen, dtype=torch.long).repeat_interleave(counts),
            loss_M=torch.cat(losses) if losses else torch.empty(0),
        )


@dataclass(frozen=True)
class _TargetTable:
    """Targets of several examples with their contexts."""

    context_MC: Tensor
    """Projected hidden states, float16, see measure.py."""
    previous_M: Tensor
    """Id of the token before the target."""
    target_M: Tensor
    example_M: Tensor
    """Index of the example."""
    loss_M: Tensor
    """Of the model alone."""


class _Datastore:
    """Stored targets, sorted by the token before them."""

    def __init__(self, stored: _TargetTable, group_E: Tensor, question_ES: Tensor) -> None:
        self.order_M = stored.previous_M.argsort(stable=True)
        self.centre_C = _mean(stored.context_MC)
        self.context_MC = stored.context_MC[self.order_M]
        self.target_M = stored.target_M[self.order_M]
        self.example_M = stored.example_M[self.order_M]
        self.previous_M = stored.previous_M[self.order_M].numpy()
        self.group_E = group_E
        self.question_ES = question_ES

    def look_up(
        self, asked: _TargetTable, question_share: float, own_cosine: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, suggested tokens and the examples that suggest them, each of shape [Q].

        `question_share`: by how much another question lowers a cosine; `own_cosine`: the cosine of
        a neighbour that votes as strongly as the model itself.
        """
        loss_Q = asked.loss_M.clone()
        suggested_Q = torch.full_like(asked.target_M, NO_SUGGESTION)
        against_Q = torch.full_like(asked.target_M, NO_SUGGESTION)
        for part_Q, candidate_B, cosine_QB in self._cosines(asked):
            if question_share:
                alike_QB = self._alike(asked.example_M[part_Q], candidate_B)
                cosine_QB += question_share * (alike_QB - 1)
            cosine_QK, nearest_QK = cosine_QB.topk(min(NEIGHBOURS, len(candidate_B)), dim=1)
            nearest_QK = candidate_B[nearest_QK]
            figures = (asked.target_M[part_Q], asked.loss_M[part_Q], own_cosine)
            votes = _vote(self.target_M[nearest_QK], cosine_QK, *figures)
            loss_Q[part_Q], suggested_Q[part_Q], best_Q = votes
            example_Q = self.example_M[nearest_QK.gather(1, best_Q[:, None])[:, 0]]
            is_other_Q = suggested_Q[part_Q] != NO_SUGGESTION
            against_Q[part_Q] = torch.where(is_other_Q, example_Q, NO_SUGGESTION)
        return loss_Q, suggested_Q, against_Q

    def compare(self, asked: _TargetTable, loss_Q: Tensor, loss_M: Tensor) -> Tensor:
        """Standard deviations of each loss from those of its peers, shape [Q], float64.

        `loss_M`: of the stored targets, as they were given.
        """
        loss_M = loss_M[self.order_M]
        mean, variance = (loss_M.mean(), loss_M.var(correction=0)) if len(loss_M) else (0.0, 0.0)
        mean_Q = torch.zeros_like(loss_Q) + mean
        variance_Q = torch.zeros_like(loss_Q) + variance
        for part_Q, candidate_B, cosine_QB in self._cosines(asked):
            cosine_QK, nearest_QK = cosine_QB.topk(min(PEERS, len(candidate_B)), dim=1)
            peer_QK = loss_M[candidate_B[nearest_QK]]
            distance_QK = (cosine_QK - cosine_QK[:, :1]) / PEER_TEMPERATURE
            # Without any other row, all cosines are -inf and their differences NaN.
            weight_QK = distance_QK.double().exp().nan_to_num(0)
            whole_Q = weight_QK.sum(dim=1) + PRIOR
            mean_Q[part_Q] = ((weight_QK * peer_QK).sum(dim=1) + PRIOR * mean) / whole_Q
            square_QK = (peer_QK - mean_Q[part_Q, None]) ** 2
            variance_Q[part_Q] = ((weight_QK * square_QK).sum(dim=1) + PRIOR * variance) / whole_Q
        return (loss_Q - mean_Q) / variance_Q.sqrt().clamp(min=FEWEST_NATS)

    def _cosines(self, asked: _TargetTable) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Indices of queries and of their candidates, and the cosines of their contexts.

        Candidates of the query's own group have -inf.
        """
        order_Q = asked.previous_M.argsort(stable=True)
        tokens, sizes = np.unique(asked.previous_M.numpy(), return_counts=True)
        for token, same_Q in zip(tokens, torch.split(order_Q, sizes.tolist()), strict=True):
            candidate_B = self._candidates(token)
            if not len(candidate_B):
                continue
            contexts_BC = self._direction(self.context_MC[candidate_B])
            group_B = self.group_E[self.example_M[candidate_B]]
            for part_Q in torch.split(same_Q, max(1, COSINES_AT_ONCE // len(candidate_B))):
                cosine_QB = self._direction(asked.context_MC[part_Q]) @ contexts_BC.T
                own_QB = self.group_E[asked.example_M[part_Q], None] == group_B
                yield part_Q, candidate_B, cosine_QB.masked_fill_(own_QB, -torch.inf)

    def _alike(self, example_Q: Tensor, candidate_B: Tensor) -> Tensor:
        """Cosines of the questions of queries and candidates; 1 for a query without a question."""
        question_QS = self.question_ES[example_Q].float()
        question_BS = self.question_ES[self.example_M[candidate_B]].float()
        is_asked_Q = question_QS.any(dim=1)
        return torch.where(is_asked_Q[:, None], question_QS @ question_BS.T, 1.0)

    def _candidates(self, token: int) -> Tensor:
        """Indices of stored targets that follow a token."""
        first, behind = np.searchsorted(self.previous_M, [token, token + 1]).tolist()
        step = max(1, -(-(behind - first) // MOST_CANDIDATES))
        return torch.arange(first, behind, step)

    def _direction(self, context_QC: Tensor) -> Tensor:
        """Direction of a context from the mean of all: raw hidden states mostly point one way."""
        return normalize(context_QC.float() - self.centre_C, dim=1)


def _vote(
    token_QK: Tensor, cosine_QK: Tensor, target_Q: Tensor, loss_Q: Tensor, own_cosine: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each target by its neighbours and the model, the token they suggest, and the
    nearest neighbour with it."""
    vote_QK = ((cosine_QK.double() - 1) / TEMPERATURE).exp()
    own = np.exp((own_cosine - 1) / TEMPERATURE)
    total_Q = vote_QK.sum(dim=1) + own
    agreed_Q = (vote_QK * (token_QK == target_Q[:, None])).sum(dim=1)
    # A loss that is not finite stays so; the scores bound it.
    probability_Q = (agreed_Q + own * (-loss_Q.double()).exp()) / total_Q
    # Neighbours with the same token pool their votes.
    shared_QK = (vote_QK[:, None] * (token_QK[:, None] == token_QK[:, :, None])).sum(dim=2)
    # Of equal sums, the first is that of the nearest neighbour.
    most_Q, best_Q = shared_QK.max(dim=1)
    suggested_Q = token_QK.gather(1, best_Q[:, None])[:, 0]
    is_other_Q = (most_Q > total_Q / 2) & (suggested_Q != target_Q)
    found_Q = torch.where(torch.isfinite(loss_Q), -probability_Q.log(), loss_Q.double())
    return found_Q.to(loss_Q.dtype), torch.where(is_other_Q, suggested_Q, NO_SUGGESTION), best_Q


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
