"""Attend within each example of a row, so that a micro-batch is one row without padding.

With a mask, attention computes the whole square of a row and hides most of it. Here the row is cut
at its examples, each attends to itself as a causal row of its own, and their outputs are joined. So
no layer computes padding either. For `sdpa` on a CPU; a GPU would start a kernel for each example.

Whatever is not such a row (several rows, a mask, a cache) goes to transformers' own attention.
"""

# B = rows, H = heads, T = tokens, D = size of a head

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from yrunner.models.limits import has_windows, isolates_examples

BY_EXAMPLE = "sdpa_by_example"
"""Its name among the attention implementations of transformers."""


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
