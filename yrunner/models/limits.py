"""What a model cannot take: packed rows that it would mix, rows longer than its positions.

transformers isolates packed examples by their positions alone, which restart at each. A model that
ignores that (a state-space layer, custom attention) mixes them silently. So it is tried out, not
looked up in a list.
"""

# Shapes: T = tokens, V = vocabulary

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from yrunner.errors import DataError, MissingError, ModelError, Origin

PROBE_LENGTH = 12
"""Tokens of each example in the trial: longer than the kernels of short convolutions."""


def require_flash_attention() -> None:
    """Raise `MissingError` without the package that model.attention flash_attention_2 needs."""
    if not is_flash_attn_2_available() and find_spec("kernels") is None:
        raise MissingError(
            "model.attention flash_attention_2 needs a GPU and the package flash-attn",
            remedy="run pip install flash-attn, or set model.attention: sdpa",
        )


def check_isolation(model: Any) -> None:
    """Raise `ModelError` if the model mixes the examples of a packed row."""
    if not isolates_examples(model):
        raise ModelError(
            f"data.packing: this {model.config.model_type} model with "
            f"{model.config._attn_implementation} attention mixes the examples of a row",
            remedy="set data.packing to false, or try another model.attention",
        )


def isolates_examples(model: Any) -> bool:
    """Whether an example's logits are the same alone and after any other example.

    Three short forward passes, in the model's precision and on its device.
    """
    vocabulary_size = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(
        vocabulary_size, (3, PROBE_LENGTH), generator=generator
    ).tolist()
    was_training = model.training
    model.eval()
    try:
        alone_TV = _last_logits(model, [second])
        after_first_TV = _last_logits(model, [first, second])
        after_other_TV = _last_logits(model, [other, second])
    except TypeError as error:
        if "position_ids" not in str(error):
            raise
        return False  # nothing else could isolate the examples
    finally:
        model.train(was_training)
    precision = _precision(model, alone_TV)
    # Rounding within a row is always the same, except where experts get other tokens.
    leak = _relative_difference(after_first_TV, after_other_TV)
    change = _relative_difference(after_first_TV, alone_TV)
    return leak <= (precision if _has_experts(model) else 0.0) and change <= precision**0.5


def _last_logits(model: Any, examples: Sequence[Sequence[int]]) -> Tensor:
    """Logits of the last of the examples, packed into one row as `collate` does it, [T, V]."""
    inputs = {"input_ids": torch.tensor([list(chain.from_iterable(examples))])}
    if len(examples) > 1:
        positions = chain.from_iterable(range(len(example)) for example in examples)
        inputs["position_ids"] = torch.tensor([list(positions)])
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with torch.no_grad():
        logits_TV = model(**inputs, use_cache=False).logits[0, -len(examples[-1]) :]
    return logits_TV.cpu()


def _precision(model: Any, logits_TV: Tensor) -> float:
    """Relative precision of the coarsest dtype on the way to the logits."""
    dtypes = {logits_TV.dtype, model.dtype}
    if torch.is_autocast_enabled(model.device.type):
        dtypes.add(torch.get_autocast_dtype(model.device.type))
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _has_experts(model: Any) -> bool:
    return any("experts" in key for key in model.config.get_text_config().to_dict())


def _relative_difference(logits_TV: Tensor, other_TV: Tensor) -> float:
    """Norm of the difference relative to the logits, both centred."""
    mine_TV = logits_TV.double() - logits_TV.double().mean(dim=-1, keepdim=True)
    theirs_TV = other_TV.double() - other_TV.double().mean(dim=-1, keepdim=True)
    return float((mine_TV - theirs_TV).norm() / mine_TV.norm())


Lengths = Sequence[int] | NDArray[np.integer[Any]]


def check_lengths(lengths: Lengths, origin: Callable[[int], Origin], config: Any) -> None:
    """Raise `DataError` if the longest row has more tokens than the model has positions.

    `lengths`: of all rows; `origin`: the origin of a row by its index.
    """
    positions = count_positions(config)
    if positions is None or not len(lengths):
        return
    longest = int(np.argmax(lengths))
    if lengths[longest] > positions:
        raise DataError(
            origin(longest),
            f"{lengths[longest]:,} tokens, and the model has {positions:,} positions",
            remedy=f"set data.max_length to {positions}; data.too_long decides what happens "
            "to longer rows",
        )


def count_positions(config: Any) -> int | None:
    """Positions that a model was trained or stretched to; None if it has no limit."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    learned = rope.get("original_max_position_embeddings", positions)
    return max(positions, int(learned * rope.get("factor", 1)))
