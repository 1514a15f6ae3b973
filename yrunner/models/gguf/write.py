"""Write a model's folder as one GGUF file, weight by weight, and read the weights back."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from yrunner.errors import ModelError
from yrunner.models.errors import silence_libraries
from yrunner.models.gguf.tokenizer import REMEDY, add_tokens
from yrunner.models.merge.safetensors_io import SafetensorsFolder

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""llama.cpp's architecture by model_type; Mistral is a Llama there."""
BLOCK = 32
"""Numbers that share a scale in quantized types."""
COARSE = ("q5_1", "q5_0", "q4_1", "q4_0")
"""Types too coarse for embeddings and head, which are stored as q8_0, as llama.cpp does."""


def check_supported(config: Any) -> None:
    """Raise `ModelError` for a model that llama.cpp would compute differently."""
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"merge.gguf: a {config.model_type} model cannot be written as GGUF",
            remedy=f"it can for {', '.join(ARCHITECTURES)}; for others use llama.cpp's script",
        )
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ModelError(
            f"merge.gguf: rope type {kind} cannot be written as GGUF",
            remedy=REMEDY,
        )
    if getattr(config, "use_sliding_window", False):
        raise ModelError(
            "merge.gguf: llama.cpp does not support the sliding window of this model",
            remedy="for short texts, set use_sliding_window to false in its config.json",
        )


def write_gguf(
    checkpoint: SafetensorsFolder,
    config: Any,
    tokenizer: Any,
    file: Path,
    *,
    kind: str,
    name: str,
    advance: Callable[[int], None],
) -> None:
    """Write a model in the precision `kind`; call `advance(1)` for every weight.

    Vectors stay in float32. Raises `ModelError` for weights unknown to this architecture.
    """
    writer = gguf.GGUFWriter(str(file), gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(_file_type(kind))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_hyperparameters(writer, config)
    add_tokens(writer, tokenizer, config.vocab_size)
    weights = list(_named(checkpoint, config))
    for target, size, _ in weights:
        chosen = _type_of(target, tuple(size.shape), kind)
        shape = gguf.quant_shape_to_byte_shape(tuple(size.shape), chosen)
        as_bytes = np.dtype(np.uint8)
        writer.add_tensor_info(target, shape, as_bytes, math.prod(shape), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for target, size, read in weights:
        numbers = read().contiguous().numpy()
        writer.write_tensor_data(gguf.quantize(numbers, _type_of(target, tuple(size.shape), kind)))
        advance(1)
    writer.close()


def read_gguf(file: Path, config: Any) -> Any:
    """Load a GGUF file in float32 with transformers, completely into memory.

    The proof needs another reader than ours. It needs the original `config`: transformers does not
    read Qwen3's head size or Llama 3's rope from GGUF. A Mistral is a Llama in GGUF.
    """
    if config.model_type == "mistral":
        config = LlamaConfig(**{**config.to_dict(), "model_type": "llama"})
    # transformers shows a progress bar of its own.
    with silence_libraries(), redirect_stderr(StringIO()):
        return AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, config=config, dtype=torch.float32
        )


def add_hyperparameters(writer: gguf.GGUFWriter, config: Any) -> None:
    """Sizes, norm and rope."""
    head_size = getattr(config, "head_dim", None)
    head_size = head_size or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_size)
    _add_rope(writer, config.rope_parameters)


def _add_rope(writer: gguf.GGUFWriter, rope: Mapping[str, Any]) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    match rope.get("rope_type", "default"):
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _named(
    checkpoint: SafetensorsFolder, config: Any
) -> Iterator[tuple[str, Tensor, Callable[[], Tensor]]]:
    """GGUF name, size, and a reader in float32, for every weight."""
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for source, size in checkpoint.sizes.items():
        if config.tie_word_embeddings and source == "lm_head.weight":
            continue
        target = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ModelError(
                f"merge.gguf: a {config.model_type} model in GGUF has no weight {source}",
                remedy=REMEDY,
            )
        yield target, size, _reader(checkpoint, config, source)
    if config.rope_parameters.get("rope_type") == "llama3":
        factors = llama3_factors(config)
        yield "rope_freqs.weight", factors, lambda: factors


def _reader(checkpoint: SafetensorsFolder, config: Any, source: str) -> Callable[[], Tensor]:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    module = source.split(".")[-2]
    is_llama = ARCHITECTURES[config.model_type] == gguf.MODEL_ARCH.LLAMA
    if not is_llama or module not in heads:
        return lambda: checkpoint.read(source, torch.float32)
    return lambda: _interleaved(checkpoint.read(source, torch.float32), heads[module])


def _interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of queries or keys for llama.cpp's Llama, whose rope pairs neighbours.

    transformers pairs the first half of a head with the second.
    """
    half = weight.shape[0] // num_heads // 2
    parts = weight.reshape(num_heads, 2, half, *weight.shape[1:])
    return parts.swapaxes(1, 2).reshape(weight.shape)


def llama3_factors(config: Any) -> Tensor:
    """Divisors of Llama 3's rope frequencies, which stretch long waves only.

    The formula of transformers' modeling_rope_utils.
    """
    rope = config.rope_parameters
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    waves = 2 * torch.pi * rope["rope_theta"] ** exponents
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / waves
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def _type_of(target: str, shape: tuple[int, ...], kind: str) -> gguf.GGMLQuantizationType:
    """The type of one weight: vectors, and rows not divisible into blocks, are not quantized."""
    types = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return types.F32
    if kind in COARSE and target in ("token_embd.weight", "output.weight"):
        kind = "q8_0"
    chosen = types[kind.upper()]
    return types.F16 if kind.startswith("q") and shape[-1] % BLOCK else chosen


def _file_type(kind: str) -> gguf.LlamaFileType:
    prefix = "ALL" if kind == "f32" else "MOSTLY"
    return gguf.LlamaFileType[f"{prefix}_{kind.upper()}"]
