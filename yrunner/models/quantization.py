"""Linear layers in 4 or 8 bits: to train an adapter on them, and to merge it as trained.

A base may come quantized. `stored_quantization` decides by its config.json alone, before anything
is loaded, and every command follows: bitsandbytes is read, any other method is refused.
"""

import copy
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from yrunner.errors import MissingError, ModelError
from yrunner.models.errors import silence_libraries
from yrunner.models.hub import read_card

QuantType = Literal["nf4", "fp4", "int8"]
PLACES = ("quantization_config", "compression_config", "quantization")
"""Keys of a config.json that say how its weights are quantized; the last one is MLX's."""
BESIDE = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
"""Files beside config.json that older tools write instead."""
METHOD_NAMES = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "mxfp4": "MXFP4",
    "modelopt": "ModelOpt",
    "mlx": "MLX",
}
"""Names that people use for a `quant_method`; the others are called what the config calls them."""
IN_EIGHT_BITS = ("SCB", "weight_format")
"""Names beside `weight` that bitsandbytes adds to a layer in 8 bits: scales, and their order."""


@dataclass(frozen=True)
class StoredQuantization:
    """How the files of a base store its linear layers."""

    quant_type: QuantType
    double_quant: bool

    @property
    def bytes_per_weight(self) -> float:
        """See `bytes_per_weight`."""
        return bytes_per_weight(self.quant_type, double_quant=self.double_quant)

    def __str__(self) -> str:
        bits = "8 bits" if self.quant_type == "int8" else f"4 bits, {self.quant_type}"
        return f"bitsandbytes, {bits}"


def stored_quantization(source: str) -> StoredQuantization | None:
    """How the weights of a whole model are stored; None if they are not quantized, or not here yet.

    `source`: a folder, or a Hub id, which is looked up in the Hub's cache. Reads only config.json
    and what stands in its place. Raises `ModelError` for any method but that of bitsandbytes, and
    `MissingError` without bitsandbytes.
    """
    config_file = local_file(source, "config.json")
    config = {} if config_file is None else read_dict(config_file)
    found = _quantization_dict(config)
    if found is None:
        beside = [name for file, name in BESIDE.items() if local_file(source, file) is not None]
        if beside:
            raise _unreadable(source, beside[0])
        return None
    method = str(found.get("quant_method") or _unnamed_method(found)).lower()
    if not method.startswith("bitsandbytes"):
        raise _unreadable(source, METHOD_NAMES.get(method, method))
    if found.get("load_in_8bit") or found.get("_load_in_8bit"):
        stored = StoredQuantization("int8", double_quant=False)
    elif found.get("load_in_4bit") or found.get("_load_in_4bit"):
        quant_type: Any = found.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' default
        stored = StoredQuantization(quant_type, bool(found.get("bnb_4bit_use_double_quant")))
    else:
        return None
    require_bitsandbytes(f"the base {source} ({stored})")
    return stored


def _quantization_dict(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of a config that says how weights are quantized, also inside `text_config`."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            for place in PLACES:
                if isinstance(part.get(place), Mapping):
                    return part[place]
    return None


def _unnamed_method(found: Mapping[str, Any]) -> str:
    """The method of a config that names none: bitsandbytes did not at first, and MLX never does."""
    if any(str(key).strip("_").startswith("load_in_") for key in found):
        return "bitsandbytes"
    return "mlx" if {"group_size", "bits"} <= found.keys() else "an unknown method"


def _unreadable(source: str, method: str) -> ModelError:
    folder = Path(source)
    original = read_card(folder, "base_model") if folder.is_dir() else None
    return ModelError(
        f"the base {source} is quantized with {method}, which cannot be trained, scored or merged",
        remedy="use the unquantized model" + (f", {original}" if original else ""),
    )


def local_file(source: str, name: str) -> Path | None:
    """A file of a model's folder, or of the Hub's cache; None if it is not there."""
    if Path(source).is_dir():
        file = Path(source) / name
        return file if file.is_file() else None
    if Path(source).exists() or Path(source).is_absolute():
        return None
    try:
        cached = try_to_load_from_cache(source, name)
    except ValueError:
        return None  # not a Hub id; loading it says so
    return Path(cached) if isinstance(cached, str) else None


def read_dict(file: Path) -> dict[str, Any]:
    """A config.json; empty if it is damaged, which loading it reports."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def without_quantization(config: Any) -> Any:
    """The config of the same model with plain weights."""
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config()):
        for place in PLACES:
            if hasattr(part, place):
                delattr(part, place)
    return plain


def prepare_quantized(model: nn.Module, dtype: torch.dtype) -> None:
    """Compute with 4-bit layers in `dtype`, whatever the files say, and keep them trainable."""
    for module in model.modules():
        layer: Any = module
        if hasattr(layer, "compute_type_is_set"):
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
    prevent_repacking(model)


def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with plain linear layers in `dtype`, which take an adapter without rounding."""
    if not getattr(model, "is_quantized", False):
        return model
    with silence_libraries():
        return model.dequantize(dtype=dtype)


def quantization_config(
    quant_type: QuantType, *, double_quant: bool, dtype: torch.dtype
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


def bytes_per_weight(quant_type: QuantType, *, double_quant: bool) -> float:
    """Bytes per weight, including its share of the scales.

    There is a float32 scale per block of 64 weights; with `double_quant` an 8-bit one, with a
    float32 scale per 256 of them (arXiv:2305.14314).
    """
    if quant_type == "int8":
        return 1.0
    return 0.5 + (1 / 64 + 4 / (64 * 256) if double_quant else 4 / 64)


def require_bitsandbytes(what: str) -> None:
    """Raise `MissingError` without bitsandbytes. `what`: the recipe's key or base that needs it."""
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
    assert isinstance(restored, Tensor)
    return restored


def quantized_parts(names: Collection[str]) -> dict[str, dict[str, str]]:
    """What a bitsandbytes checkpoint holds of each quantized weight, by the weight's name.

    Its codes have the part "", in 4 bits "quant_state.bitsandbytes__nf4" has shape and dtype, and
    in 8 bits "SCB" has the scales.
    """
    parts: dict[str, dict[str, str]] = {}
    for name in names:
        weight, is_four_bit, part = name.partition(".weight.")
        if not is_four_bit:
            weight, _, part = name.rpartition(".")
            if part not in IN_EIGHT_BITS:
                continue
        weight += ".weight"
        if weight in names:
            parts.setdefault(weight, {"": weight})[part] = name
    return parts


def dequantize_weight(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The weight of these parts, as a forward pass dequantizes it; `dtype`: of an 8-bit weight."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant

    rest = {name: tensor for name, tensor in parts.items() if name}
    if "SCB" in rest:
        restored = int8_vectorwise_dequant(parts[""], rest["SCB"]).to(dtype)
    else:
        state = QuantState.from_dict(rest, torch.device("cpu"))
        # The codes may be stored as another dtype, for FSDP; they are bytes all the same.
        restored = dequantize_4bit(parts[""].view(torch.uint8).view(-1, 1), state)
    assert isinstance(restored, Tensor)
    return restored
