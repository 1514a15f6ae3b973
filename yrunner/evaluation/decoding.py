"""How the next token is chosen: by its likelihood, by chance, or by both as the entropy says.

Chance comes from the question, not from the batch: every question draws from numbers of its own,
so that a sampled answer, too, is the same for any batch size.
"""

# B = answers of a batch, V = vocabulary

from collections.abc import Sequence
from typing import assert_never

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from yrunner.recipe.schema_eval import (
    BeamWriting,
    DynamicWriting,
    Generation,
    GreedyWriting,
    SampleWriting,
)

Seed = tuple[int, int]
"""The seed of a run, and the number of the question."""

COLDEST = 1e-4
"""Temperature in place of 0, which nothing can be divided by."""


def choosers(generation: Generation, seeds: Sequence[Seed]) -> LogitsProcessorList:
    """What makes of the logits the choice of the next token, one step behind the other.

    The likeliest token of the result is the one that is chosen. `seeds` has one for each answer of
    the batch.
    """
    match generation:
        case GreedyWriting() | BeamWriting():
            return LogitsProcessorList()
        case SampleWriting():
            return LogitsProcessorList([*_warpers(generation), DrawnToken(seeds)])
        case DynamicWriting():
            by_entropy = FreedomByEntropy(
                greedy_below=generation.greedy_below,
                free_above=generation.free_above,
                temperature=generation.temperature,
                top_k=generation.top_k,
            )
            return LogitsProcessorList([by_entropy, DrawnToken(seeds)])
        case _:
            assert_never(generation)


class DrawnToken(LogitsProcessor):
    """Draw a token by its probability, and make it the only one that is left."""

    def __init__(self, seeds: Sequence[Seed]) -> None:
        self._chances = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of shape [B, V] in, zero for the drawn token and minus infinity elsewhere out."""
        chance_B = torch.tensor([chance.random() for chance in self._chances], dtype=torch.float64)
        # In float64 a sum over a large vocabulary still tells apart what is unlikely.
        cumulative_BV = scores.double().softmax(-1).cumsum(-1)
        drawn_B = chance_B.to(scores.device) * cumulative_BV[:, -1]
        token_B1 = torch.searchsorted(cumulative_BV, drawn_B[:, None], right=True)
        token_B1 = token_B1.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, token_B1, 0.0)


class FreedomByEntropy(LogitsProcessor):
    """Set temperature and top-k of every token by the entropy of the model's prediction.

    Up to `greedy_below` nats only the likeliest token is left; from `free_above` on `temperature`
    and `top_k` hold as they are; between the two, both rise evenly.
    """

    def __init__(
        self, *, greedy_below: float, free_above: float, temperature: float, top_k: int
    ) -> None:
        self._greedy_below, self._free_above = greedy_below, free_above
        self._temperature, self._top_k = temperature, top_k

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of shape [B, V] in and out."""
        log_BV = scores.log_softmax(-1)
        # A token that was made impossible before would give zero times minus infinity.
        entropy_B = -(log_BV.exp() * log_BV).nan_to_num(0.0).sum(-1)
        rise = self._free_above - self._greedy_below
        freedom_B = ((entropy_B - self._greedy_below) / rise).clamp(0, 1)
        top_k = min(self._top_k, scores.shape[-1])
        top_BK = scores.topk(top_k).values
        last_B = (freedom_B * (top_k - 1)).round().long()
        least_B1 = top_BK.gather(-1, last_B[:, None])
        temperature_B = (freedom_B * self._temperature).clamp(min=COLDEST)
        return scores.masked_fill(scores < least_B1, -torch.inf) / temperature_B[:, None]


def _warpers(generation: SampleWriting) -> list[LogitsProcessor]:
    """In transformers' own order; those that change nothing are left out."""
    warpers: list[LogitsProcessor] = []
    if generation.temperature != 1:
        warpers.append(TemperatureLogitsWarper(generation.temperature))
    if generation.top_k:
        warpers.append(TopKLogitsWarper(generation.top_k))
    if generation.top_p < 1:
        warpers.append(TopPLogitsWarper(generation.top_p))
    if generation.min_p:
        warpers.append(MinPLogitsWarper(generation.min_p))
    return warpers
