"""Attend within each example of a row, so that a micro-batch is one row without padding.

With a mask, attention computes the whole square of a row and hides most of it. Here the row is cut
at its examples, each attends to itself as a causal row of its own, and their outputs are joined. So
no layer computes padding either. For `sdpa` on a CPU; a GPU would start a kernel for each example.

torch's attention on a CPU gains nothing by half precision before an example has a thousand tokens.
Where the layers around it compute in half precision, the products are computed here, for examples
of about one length together. Attention weights of long examples are computed again backwards.

Whatever is not such a row (several rows, a mask, a cache) goes to transformers' own attention.
"""

# B = rows, H = heads, T = tokens, D = size of a head. Of examples that are padded to one length:
# E = examples, K = heads of keys and values, N = E K, L = tokens, G = H / K, Q = L G

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from yrunner.models.layers.joined_lora import COMPUTED_IN
from yrunner.models.limits import has_windows, isolates_examples

BY_EXAMPLE = "sdpa_by_example"
"""Its name among the attention implementations of transformers."""
BLOCK = 256
"""Queries of an example that are computed together."""
MULTIPLE = 16
"""Examples are padded to a multiple of so many tokens: products and softmax take less time."""
LEAST_OF_LONGEST = 0.5
"""The shortest example of a batch has at least this part of the longest one's tokens."""
KEPT = 1.5
"""Attention weights are kept for the backward pass if they are at most so many times as large as
the queries; larger ones are computed again."""


def attend_by_example(model: Any) -> bool:
    """Let a model attend by example from now on, if it can; whether it does.

    Tried out in the model's precision: attention that is not given the positions would mix the
    examples of a row.
    """
    config = model.config.get_text_config()
    if config._attn_implementation == BY_EXAMPLE:
        return True
    if model.device.type != "cpu" or config._attn_implementation != "sdpa" or has_windows(config):
        return False
    AttentionInterface.register(BY_EXAMPLE, _attend)
    AttentionMaskInterface.register(BY_EXAMPLE, _mask)
    config._attn_implementation = BY_EXAMPLE
    if isolates_examples(model):
        return True
    config._attn_implementation = "sdpa"
    return False


def _mask(
    batch_size: int, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs: Any
) -> Tensor | None:
    """No mask for a single row whose tokens see all before them in their example."""
    is_whole = kwargs["q_length"] == kwargs["kv_length"]
    if batch_size == 1 and attention_mask is None and not use_vmap and is_whole:
        return None
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size, attention_mask=attention_mask, use_vmap=use_vmap, **kwargs
    )
    return mask


def _attend(
    module: Any,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The outputs of attention, of shape [B, T, H, D]."""
    inputs = query_BHTD, key_BHTD, value_BHTD
    lengths = [query_BHTD.shape[2]]
    is_row = len(query_BHTD) == 1 and query_BHTD.shape[2] == key_BHTD.shape[2]
    is_plain = attention_mask is None and kwargs.get("position_bias") is None
    if is_row and is_plain and position_ids is not None and position_ids.ndim == 2:
        dtype = COMPUTED_IN.get()
        is_same_size = query_BHTD.shape[3] == value_BHTD.shape[3]
        if dtype is not None and is_same_size and not kwargs.get("dropout"):
            padding = _padding(position_ids, key_BHTD.shape[1])
            scale = kwargs.get("scaling") or query_BHTD.shape[3] ** -0.5
            return _half_attention(*inputs, padding, scale, dtype), None
        lengths = _lengths(position_ids)
    if len(lengths) == 1:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, *inputs, attention_mask, **kwargs
        )
        return output
    examples = zip(*(torch.split(it, lengths, 2) for it in inputs), strict=True)
    outputs = [sdpa_attention_forward(module, *example, None, **kwargs)[0] for example in examples]
    return torch.cat(outputs, 1), None


@lru_cache(maxsize=1)
def _lengths(position_ids: Tensor) -> list[int]:
    """Tokens of each example of a row, by its positions, shape [1, T].

    All layers ask for the same tensor: asked twice, it is the same object.
    """
    starts = (position_ids[0].diff() != 1).nonzero().flatten() + 1
    ends = [0, *starts.tolist(), position_ids.shape[1]]
    return [end - start for start, end in pairwise(ends)]


@dataclass(frozen=True)
class _Padding:
    """Which place of a row, a token and a head of keys, goes where among padded examples."""

    sources: Sequence[Tensor]
    """For each batch of examples, the place that each of its N L copies is of."""
    lengths: Sequence[int]
    """L of each batch."""
    num_tokens: int
    copies: Tensor
    """Where among the copies of all batches each of the T K places is."""

    def pad(self, it_BHTD: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """The copies of each batch, of shape [N, L G, D]; zero for padding."""
        num_places, head_size = len(self.copies), it_BHTD.shape[-1]
        places = it_BHTD.new_empty(num_places + 1, it_BHTD.numel() // num_places, dtype=dtype)
        places[:-1] = it_BHTD.transpose(1, 2).reshape(num_places, -1)
        places[-1] = 0
        return [
            places.index_select(0, source).view(len(source) // length, -1, head_size)
            for source, length in zip(self.sources, self.lengths, strict=True)
        ]

    def unpad(self, batches: Sequence[Tensor]) -> Tensor:
        """A row, of shape [B, H, T, D], from its copies."""
        sources = zip(self.sources, batches, strict=True)
        copies = [batch.view(len(source), -1) for source, batch in sources]
        joined = copies[0] if len(copies) == 1 else torch.cat(copies)
        places = joined.index_select(0, self.copies)
        return places.view(1, self.num_tokens, -1, batches[0].shape[-1]).transpose(1, 2)


@lru_cache(maxsize=1)
def _padding(position_ids: Tensor, num_heads: int) -> _Padding:
    """Examples of about one length in a batch; those longer than a block only beside their like."""
    lengths = _lengths(position_ids)
    starts = [0, *accumulate(lengths)]
    num_places = starts[-1] * num_heads
    left = sorted(range(len(lengths)), key=lambda example: -lengths[example])
    sources, padded_lengths = [], []
    while left:
        longest = lengths[left[0]]
        least = longest if longest > BLOCK else longest * LEAST_OF_LONGEST
        length = -(-longest // MULTIPLE) * MULTIPLE
        chosen = [example for example in left if lengths[example] >= least]
        left = left[len(chosen) :]
        token_EL = torch.tensor([[starts[it]] for it in chosen]) + torch.arange(length)
        is_padding_EL = token_EL >= torch.tensor([[starts[it + 1]] for it in chosen])
        place_EKL = token_EL[:, None] * num_heads + torch.arange(num_heads)[:, None]
        place_EKL.masked_fill_(is_padding_EL[:, None], num_places)
        sources.append(place_EKL.flatten())
        padded_lengths.append(length)
    copies = torch.empty(num_places + 1, dtype=torch.int64)
    copies[torch.cat(sources)] = torch.arange(sum(map(len, sources)))
    return _Padding(sources, padded_lengths, starts[-1], copies[:-1])


class _HalfAttention(torch.autograd.Function):
    """Causal attention within each example, with products in half precision, of that dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTD: Tensor,
        key_BHTD: Tensor,
        value_BHTD: Tensor,
        padding: _Padding,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """The outputs, of shape [B, T, H, D]."""
        padded = [padding.pad(it, dtype) for it in (query_BHTD, key_BHTD, value_BHTD)]
        outputs: list[Tensor] = []
        saved: list[Tensor | None] = []
        for query_NQD, key_NLD, value_NLD in zip(*padded, strict=True):
            output_NQD = torch.empty_like(query_NQD)
            for queries, keys, mask_QL in _blocks(query_NQD, key_NLD):
                weights_NQL = _weights(query_NQD[:, queries], key_NLD[:, keys], mask_QL, scale)
                torch.bmm(weights_NQL, value_NLD[:, keys], out=output_NQD[:, queries])
            is_kept = key_NLD.shape[1] <= min(KEPT * key_NLD.shape[2], BLOCK)
            saved += [query_NQD, key_NLD, value_NLD, weights_NQL if is_kept else None]
            outputs.append(output_NQD)
        ctx.padding, ctx.scale = padding, scale
        ctx.save_for_backward(*saved)
        return padding.unpad(outputs).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BTHD: Tensor) -> tuple[Any, ...]:
        """Of queries, keys and values, in float32."""
        padding, saved = ctx.padding, ctx.saved_tensors
        of_outputs = padding.pad(gradient_BTHD.transpose(1, 2), saved[0].dtype)
        found = [
            _gradients(ctx.scale, of_output_NQD, *saved[4 * index : 4 * index + 4])
            for index, of_output_NQD in enumerate(of_outputs)
        ]
        of_query, of_key, of_value = map(padding.unpad, zip(*found, strict=True))
        return of_query.float().mul_(ctx.scale), of_key.mul_(ctx.scale), of_value, None, None, None


_half_attention: Any = _HalfAttention.apply


def _blocks(query_NQD: Tensor, key_NLD: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries that are computed together, the keys up to the last of them, and their mask."""
    length = key_NLD.shape[1]
    num_groups = query_NQD.shape[1] // length
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        queries = slice(start * num_groups, end * num_groups)
        yield queries, slice(0, end), _mask_of_block(start, end, num_groups, query_NQD.dtype)


@lru_cache(maxsize=8)
def _mask_of_block(start: int, end: int, num_groups: int, dtype: torch.dtype) -> Tensor:
    """-inf where a key comes after the token of a query, else 0."""
    mask_LL = torch.full((end - start, end), -torch.inf, dtype=dtype).triu(start + 1)
    return mask_LL.repeat_interleave(num_groups, 0)


def _weights(query_NQD: Tensor, key_NLD: Tensor, mask_QL: Tensor, scale: float) -> Tensor:
    """How much each query attends to each key. Softmax of half precision takes longer."""
    scores_NQL = torch.baddbmm(mask_QL, query_NQD, key_NLD.mT, alpha=scale)
    return scores_NQL.softmax(-1, torch.float32).to(scores_NQL.dtype)


def _gradients(
    scale: float,
    of_output_NQD: Tensor,
    query_NQD: Tensor,
    key_NLD: Tensor,
    value_NLD: Tensor,
    kept_NQL: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of scaled queries and keys, and of values, whose sums over blocks are float32."""
    of_query_NQD = torch.empty_like(query_NQD)
    of_key_NLD = torch.zeros_like(key_NLD, dtype=torch.float32)
    of_value_NLD = torch.zeros_like(value_NLD, dtype=torch.float32)
    for queries, keys, mask_QL in _blocks(query_NQD, key_NLD):
        query, key, of_output = query_NQD[:, queries], key_NLD[:, keys], of_output_NQD[:, queries]
        weights = _weights(query, key, mask_QL, scale) if kept_NQL is None else kept_NQL
        of_weights = of_output @ value_NLD[:, keys].mT
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        torch.bmm(of_scores, key, out=of_query_NQD[:, queries])
        of_key_NLD[:, keys] += of_scores.mT @ query
        of_value_NLD[:, keys] += weights.mT @ of_output
    return of_query_NQD, of_key_NLD, of_value_NLD
