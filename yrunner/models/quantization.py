"""What is left of a weight that was stored in 4 bits: the values that an adapter was trained on.

A base whose linear layers are stored in 4 or 8 bits, so that an adapter is trained through them.

Beside four_bits.py, which says what such a weight is worth when it is merged.
"""

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

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


def quantization_config(
    quant_type: Literal["nf4", "fp4", "int8"], *, double_quant: bool, dtype: torch.dtype
) -> BitsAndBytesConfig:
    """How transformers is to store the linear layers; `dtype` is what they are computed in."""
    if quant_type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def bytes_of_stored(quant_type: Literal["nf4", "fp4", "int8"], *, double_quant: bool) -> float:
    """Bytes that a stored number takes with its share of the scales: one for each block of 64, in
    float32, or in 8 bits with a scale of its own for each 256 (arXiv:2305.14314)."""
    if quant_type == "int8":
        return 1.0
    return 0.5 + (1 / 64 + 4 / (64 * 256) if double_quant else 4 / 64)


def need_bitsandbytes(what: str) -> None:
    """Raise `MissingError` where bitsandbytes is not installed. `what` is the key that needs it."""
    if find_spec("bitsandbytes") is None:
        raise MissingError(f"{what} needs bitsandbytes", remedy="run pip install 'yrunner[qlora]'")


def keep_trainable(model: nn.Module) -> None:
    """Let layers in 4 bits stay as they are when the model is measured.

    A processor that multiplies bfloat16 would repack them at the first look in eval mode, after
    which they can no longer be trained through.
    """
    for module in model.modules():
        layer: Any = module
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
