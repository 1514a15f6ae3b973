"""Attend within each example of a row, so that a micro-batch is one row without padding.

With a mask, attention computes the whole square of a row and hides most of it. Here the row is cut
at its examples, each attends to itself as a causal row of its own, and their outputs are joined. So
no layer computes padding either. Where the model computes in bfloat16, long examples are computed
in blocks of queries, without most of the scores that a causal mask hides. For `sdpa` on a CPU; a
GPU would start a kernel for each example.

Whatever is not such a row (several rows, a mask, a cache) goes to transformers' own attention.
"""

# B = rows, H = heads, K = heads of keys, T = tokens, D = size of a head, R = tokens times the heads
# that share a key

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from yrunner.models.layers.joined_lora import IN_FLOAT32
from yrunner.models.limits import has_windows, isolates_examples

BY_EXAMPLE = "sdpa_by_example"
"""Its name among the attention implementations of transformers."""
IN_BLOCKS = range(256, 1025)
"""Lengths of the examples that are computed in blocks where the model computes in bfloat16. Torch's
attention computes the whole square of them. Shorter and longer ones, and float32, gain nothing."""
BLOCK = 64
"""Most queries that are computed at once."""


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
        lengths = lengths_of_examples(position_ids)
    if len(lengths) == 1:
        return _attend_one(module, inputs, attention_mask, is_row and is_plain, kwargs), None
    examples = zip(*(torch.split(it, lengths, 2) for it in inputs), strict=True)
    outputs = [_attend_one(module, example, None, True, kwargs) for example in examples]
    return torch.cat(outputs, 1), None


def _attend_one(
    module: Any,
    inputs: Sequence[Tensor],
    attention_mask: Tensor | None,
    is_example: bool,
    kwargs: dict[str, Any],
) -> Tensor:
    """The output for an example, or for rows that are left to transformers."""
    query_BHTD = inputs[0]
    if is_example and _takes_blocks(query_BHTD) and _is_causal(module, inputs, kwargs):
        scale = kwargs.get("scaling") or query_BHTD.shape[-1] ** -0.5
        output_BTHD: Tensor = _in_blocks(*inputs, scale)
    else:
        output_BTHD, _ = sdpa_attention_forward(module, *inputs, attention_mask, **kwargs)
    return output_BTHD


@lru_cache(maxsize=1)
def lengths_of_examples(position_ids: Tensor) -> list[int]:
    """Tokens of each example of a row, by its positions, shape [1, T].

    All layers ask for the same tensor: asked twice, it is the same object.
    """
    starts = (position_ids[0].diff() != 1).nonzero().flatten() + 1
    ends = [0, *starts.tolist(), position_ids.shape[1]]
    return [end - start for start, end in pairwise(ends)]


def _takes_blocks(query_BHTD: Tensor) -> bool:
    return IN_FLOAT32.get() and query_BHTD.shape[2] in IN_BLOCKS


def _is_causal(module: Any, inputs: Sequence[Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether it is causal attention in float32 on a CPU, and nothing more."""
    query, key, value = inputs
    if any(it.dtype != torch.float32 or it.device.type != "cpu" for it in inputs):
        return False
    is_plain = not any(kwargs.get(name) for name in ("dropout", "softcap", "cache"))
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    fits = query.shape[-1] == value.shape[-1] and query.shape[1] % key.shape[1] == 0
    return is_plain and is_causal and fits and not torch.is_autocast_enabled("cpu")


class _InBlocks(torch.autograd.Function):
    """Causal attention of an example, of shape [1, T, H, D].

    The forward pass is float32. The backward pass multiplies in bfloat16 and needs only the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_1HTD: Tensor,
        key_1KTD: Tensor,
        value_1KTD: Tensor,
        scale: float,
    ) -> Tensor:
        """Scores are multiplied by `scale`."""
        inputs = query_1HTD, key_1KTD, value_1KTD
        ctx.save_for_backward(*inputs)
        ctx.scale = scale
        return _blocks_forward(*inputs, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_1THD: Tensor) -> tuple[Any, ...]:
        """The gradients of queries, keys and values."""
        query_1HTD, key_1KTD, value_1KTD = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            inputs = query_1HTD, key_1KTD, value_1KTD
            return *_blocks_backward(gradient_1THD, *inputs, ctx.scale), None


_in_blocks: Any = _InBlocks.apply


def _blocks_forward(
    query_1HTD: Tensor, key_1KTD: Tensor, value_1KTD: Tensor, scale: float
) -> Tensor:
    """A block of queries times the keys that it may see, where torch multiplies with all."""
    query_KRD = _by_key(query_1HTD[0], key_1KTD.shape[1]) * scale
    key_KTD, value_KTD = key_1KTD[0].contiguous(), value_1KTD[0].contiguous()
    output_THD = torch.empty_like(query_1HTD[0].transpose(0, 1))
    for start, end in _blocks(key_KTD.shape[1]):
        shares = _shares(query_KRD, key_KTD, start, end)
        found_KRD = torch.bmm(shares, value_KTD[:, :end])
        output_THD[start:end] = _by_token(found_KRD, output_THD.shape[1])
    return output_THD[None]


def _blocks_backward(
    gradient_1THD: Tensor,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values; what each query takes is computed again."""
    dtype = torch.bfloat16
    key_KTD, value_KTD = key_1KTD[0].contiguous(), value_1KTD[0].contiguous()
    query_KRD = _by_key(query_1HTD[0], len(key_KTD)) * scale
    gradient_KRD = _by_key(gradient_1THD[0].transpose(0, 1), len(key_KTD)).to(dtype)
    queries, keys, values = (it.to(dtype) for it in (query_KRD, key_KTD, value_KTD))
    of_query_THD = torch.empty_like(gradient_1THD[0])
    of_key_KTD, of_value_KTD = torch.zeros_like(key_KTD), torch.zeros_like(value_KTD)
    num_heads = of_query_THD.shape[1]
    per_key = num_heads // len(key_KTD)
    for start, end in _blocks(key_KTD.shape[1]):
        rows = slice(start * per_key, end * per_key)
        shares = _shares(query_KRD, key_KTD, start, end).to(dtype)
        of_value_KTD[:, :end] += torch.bmm(shares.mT, gradient_KRD[:, rows])
        of_shares = torch.bmm(gradient_KRD[:, rows], values[:, :end].mT)
        of_scores = torch._softmax_backward_data(of_shares, shares, -1, dtype)
        of_key_KTD[:, :end] += torch.bmm(of_scores.mT, queries[:, rows])
        of_query_THD[start:end] = _by_token(torch.bmm(of_scores, keys[:, :end]), num_heads)
    of_query_THD.mul_(scale)
    return of_query_THD.transpose(0, 1)[None], of_key_KTD[None], of_value_KTD[None]


def _blocks(length: int) -> list[tuple[int, int]]:
    """First and last of the queries of each block; blocks of nearly equal size."""
    number = -(-length // BLOCK)
    return list(pairwise(length * block // number for block in range(number + 1)))


def _shares(query_KRD: Tensor, key_KTD: Tensor, start: int, end: int) -> Tensor:
    """What the queries from `start` to `end` take of each value: softmax of their scores."""
    per_key = query_KRD.shape[1] // key_KTD.shape[1]
    rows_KRD = query_KRD[:, start * per_key : end * per_key]
    scores = torch.bmm(rows_KRD, key_KTD[:, :end].mT)
    scores[:, :, start:] += _hidden(end - start, per_key)
    return torch.softmax(scores, -1)


@lru_cache(maxsize=4)
def _hidden(num_queries: int, per_key: int) -> Tensor:
    """What hides from each query of a block the keys behind it."""
    one_per_query = torch.full((num_queries, num_queries), float("-inf")).triu_(1)
    return one_per_query.repeat_interleave(per_key, 0)


def _by_key(x_HTD: Tensor, num_keys: int) -> Tensor:
    """The heads that share a key in one matrix, [K, R, D], token by token."""
    heads = x_HTD.reshape(num_keys, -1, *x_HTD.shape[1:])
    return heads.transpose(1, 2).flatten(1, 2)


def _by_token(x_KRD: Tensor, num_heads: int) -> Tensor:
    """The same tokens in the shape [T, H, D]."""
    tokens = x_KRD.view(len(x_KRD), -1, num_heads // len(x_KRD), x_KRD.shape[2])
    return tokens.transpose(0, 1).flatten(1, 2)
