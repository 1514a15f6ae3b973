"""Linear layers in 4 or 8 bits: to train an adapter on them, and to merge it as trained."""

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from yrunner.errors import MissingError


def quantization_config(
    quant_type: Literal["nf4", "fp4", "int8"], *, double_quant: bool, dtype: torch.dtype
) -> BitsAndBytesConfig:
    """How transformers stores the linear layers; `dtype`: of the computation."""
    if quant_type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def bytes_per_weight(quant_type: Literal["nf4", "fp4", "int8"], *, double_quant: bool) -> float:
    """Bytes per weight, including its share of the scales.

    There is a float32 scale per block of 64 weights; with `double_quant` an 8-bit one, with a
    float32 scale per 256 of them (arXiv:2305.14314).
    """
    if quant_type == "int8":
        return 1.0
    return 0.5 + (1 / 64 + 4 / (64 * 256) if double_quant else 4 / 64)


def require_bitsandbytes(what: str) -> None:
    """Raise `MissingError` without bitsandbytes. `what`: the recipe's key that needs it."""
    if find_spec("bitsandbytes") is None:
        raise MissingError(f"{what} needs bitsandbytes", remedy="run pip install 'yrunner[qlora]'")


def prevent_repacking(model: nn.Module) -> None:
    """Keep 4-bit layers trainable on a CPU with AVX512-BF16.

    bitsandbytes would repack them at the first forward in eval mode, and gradients could no longer
    pass through them.
    """
    for module in model.modules():
        layer: Any = module
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def four_bit_names(model: nn.Module) -> frozenset[str]:
    """Names of the weights that transformers stores in 4 bits: all linear layers but the head."""
    from transformers.quantizers.base import get_keys_to_not_convert

    exact = set(get_keys_to_not_convert(model))
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in exact
    )


def quantize_and_restore(weight: Tensor, quant_type: str, *, double_quant: bool) -> Tensor:
    """The weight after quantization to 4 bits and back: the values an adapter was trained on.

    Raises `MissingError` without bitsandbytes.
    """
    require_bitsandbytes("merge.as_trained")
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(
        weight.contiguous(), compress_statistics=double_quant, quant_type=quant_type
    )
    restored = dequantize_4bit(codes, state)
    assert isinstance(restored, torch.Tensor)
    return restored
