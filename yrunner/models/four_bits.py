"""What is left of a weight that was stored in 4 bits: the values that an adapter was trained on."""

import torch
from torch import Tensor, nn

from yrunner.errors import MissingError


def four_bit_names(model: nn.Module) -> frozenset[str]:
    """Names of the weights that transformers stores in 4 bits: of all linear layers but the head.

    A head that is tied to the embeddings is none of them either.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    exact = set(get_keys_to_not_convert(model))
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in exact
    )


def through_four_bits(weight: Tensor, quant_type: str, *, double_quant: bool) -> Tensor:
    """The weight after it was quantized to 4 bits, in blocks of 64, and made exact again.

    Raises `MissingError` without bitsandbytes.
    """
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError as error:
        raise MissingError(
            "merge.as_trained needs bitsandbytes", remedy="run pip install yrunner[qlora]"
        ) from error
    codes, state = quantize_4bit(
        weight.contiguous(), compress_statistics=double_quant, quant_type=quant_type
    )
    restored = dequantize_4bit(codes, state)
    assert isinstance(restored, torch.Tensor), "bitsandbytes gives a tensor back"
    return restored
