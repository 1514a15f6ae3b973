"""Write a model's folder as one GGUF file, weight by weight."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from yrunner.errors import ModelError
from yrunner.models.gguf.architectures import (
    ARCHITECTURES,
    PACKED_EXPERTS,
    Places,
    head_size_of,
    longrope_factor,
    rope_factors,
    rope_of,
    rotated_of,
    yarn_scale,
    yarn_scale_of,
    yarn_stretch,
)
from yrunner.models.gguf.tokenizer import REMEDY, add_tokens
from yrunner.models.merge.safetensors_io import SafetensorsFolder

BLOCK = 32
"""Numbers that share a scale in quantized types."""
COARSE = ("q5_1", "q5_0", "q4_1", "q4_0")
"""Types too coarse for embeddings and head, which are stored as q8_0, as llama.cpp does."""


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
    """Write a model in the precision `kind`; call `advance(1)` for every weight of the file.

    Vectors stay in float32. Raises `ModelError` for weights unknown to this architecture.
    """
    writer = gguf.GGUFWriter(str(file), ARCHITECTURES[config.model_type].name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(_file_type(kind))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_hyperparameters(writer, config)
    add_tokens(writer, tokenizer, config.vocab_size)
    weights = list(_weights(checkpoint, config))
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


def add_hyperparameters(writer: gguf.GGUFWriter, config: Any) -> None:
    """Sizes, norm, rope, and what only some architectures have."""
    head_size = head_size_of(config)
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
    writer.add_rope_dimension_count(rotated_of(config))
    _add_rope(writer, config)
    match config.model_type:
        case "qwen3_moe":
            writer.add_expert_count(config.num_experts)
            writer.add_expert_used_count(config.num_experts_per_tok)
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        case "gemma2" | "gemma3_text":
            writer.add_sliding_window(config.sliding_window)
            if config.attn_logit_softcapping is not None:
                writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            if config.final_logit_softcapping is not None:
                writer.add_final_logit_softcapping(config.final_logit_softcapping)
        case "phi3":
            # 0 tells llama.cpp that there is none: it guesses a window for a file without the key.
            writer.add_sliding_window(config.sliding_window or 0)


def _add_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = rope_of(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    match rope.get("rope_type", "default"):
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            stretch = yarn_stretch(rope, config.max_position_embeddings)
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(stretch)
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            # Beside what llama.cpp takes from the factor alone.
            own = yarn_scale_of(rope, stretch) / yarn_scale(stretch)
            if own != 1:
                writer.add_rope_scaling_attn_factors(own)
        case "longrope":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            factor = longrope_factor(rope, config.max_position_embeddings)
            writer.add_rope_scaling_attn_factors(factor)
    if "sliding_attention" in config.rope_parameters:
        local = config.rope_parameters["sliding_attention"]["rope_theta"]
        # The package gguf has a method for it only since llama.cpp reads it.
        writer.add_float32(f"{writer.arch}.rope.freq_base_swa", local)


def _weights(
    checkpoint: SafetensorsFolder, config: Any
) -> Iterator[tuple[str, Tensor, Callable[[], Tensor]]]:
    """GGUF name, size, and a reader in float32, for every weight of the file."""
    places = Places(config)
    experts: dict[str, dict[int, str]] = defaultdict(dict)
    for source, size in checkpoint.sizes.items():
        if config.tie_word_embeddings and source == "lm_head.weight":
            continue
        packed = PACKED_EXPERTS.fullmatch(source)
        if packed is not None:
            yield from _packed(checkpoint, places, source, packed[1], packed[2])
            continue
        place = places.find(source)
        if place is None:
            raise ModelError(
                f"merge.gguf: a {config.model_type} model in GGUF has no weight {source}",
                remedy=REMEDY,
            )
        if place.expert is None:
            yield place.target, size, partial(_read, checkpoint, places, source)
        else:
            experts[place.target][place.expert] = source
    for target, sources in experts.items():
        names = [sources[number] for number in sorted(sources)]
        shape = checkpoint.sizes[names[0]].shape
        size = torch.empty((len(names), *shape), device="meta")
        yield target, size, partial(_stack, checkpoint, names)
    for name, factors in rope_factors(config).items():
        yield name, factors, partial(torch.clone, factors)


def _packed(
    checkpoint: SafetensorsFolder, places: Places, source: str, module: str, part: str
) -> Iterator[tuple[str, Tensor, Callable[[], Tensor]]]:
    """The tensors of a weight with all experts of a layer; gates come before up-projections."""
    experts, rows, width = checkpoint.sizes[source].shape
    parts = ("down",) if part == "down" else ("gate", "up")
    size = torch.empty((experts, rows // len(parts), width), device="meta")
    for number, name in enumerate(parts):
        place = places.find(f"{module}.0.{name}_proj.weight")
        assert place is not None
        yield place.target, size, partial(_share, checkpoint, source, number, len(parts))


def _read(checkpoint: SafetensorsFolder, places: Places, source: str) -> Tensor:
    return places.to_gguf(source, checkpoint.read(source, torch.float32))


def _stack(checkpoint: SafetensorsFolder, names: list[str]) -> Tensor:
    return torch.stack([checkpoint.read(name, torch.float32) for name in names])


def _share(checkpoint: SafetensorsFolder, source: str, number: int, shares: int) -> Tensor:
    """One of the equal shares of the rows of every expert."""
    return checkpoint.read(source, torch.float32).chunk(shares, dim=1)[number]


def _type_of(target: str, shape: tuple[int, ...], kind: str) -> gguf.GGMLQuantizationType:
    """The type of one weight: vectors, and rows not divisible into blocks, are not quantized.

    Nor are the routers of experts, as in llama.cpp's own files.
    """
    types = gguf.GGMLQuantizationType
    if len(shape) == 1 or target.endswith("ffn_gate_inp.weight"):
        return types.F32
    if kind in COARSE and target in ("token_embd.weight", "output.weight"):
        kind = "q8_0"
    chosen = types[kind.upper()]
    return types.F16 if kind.startswith("q") and shape[-1] % BLOCK else chosen


def _file_type(kind: str) -> gguf.LlamaFileType:
    prefix = "ALL" if kind == "f32" else "MOSTLY"
    return gguf.LlamaFileType[f"{prefix}_{kind.upper()}"]
