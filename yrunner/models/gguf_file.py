"""Write a model's folder as one GGUF file, weight by weight, and read it back."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from yrunner.errors import ModelError
from yrunner.models.checkpoint import Checkpoint
from yrunner.models.gguf_metadata import ARCHITECTURES, add_form, add_tokens
from yrunner.models.gguf_pieces import as_llama_cpp
from yrunner.models.quiet import quiet_libraries

BLOCK = 32
"""Numbers that share a scale in the coarser types."""
COARSE = ("q5_1", "q5_0", "q4_1", "q4_0")
"""Types in which embeddings and head lose too much: they are kept in q8_0, as llama.cpp does with
types of its own."""


def write_gguf(
    checkpoint: Checkpoint,
    config: Any,
    tokenizer: Any,
    file: Path,
    *,
    kind: str,
    name: str,
    advance: Callable[[int], None],
) -> None:
    """Write a model in the precision `kind`; `advance` is called with 1 for every weight.

    Vectors stay in float32. Raises `ModelError` for weights that this form of model does not have.
    """
    writer = gguf.GGUFWriter(str(file), gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(_file_type(kind))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_form(writer, config)
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
    """The model of a GGUF file in float32, as transformers reads it; it is in memory as a whole.

    The config is handed over: transformers does not read the size of the heads of Qwen3, nor the
    rope of Llama 3. A Mistral is a Llama in such a file.
    """
    if config.model_type == "mistral":
        config = LlamaConfig(**{**config.to_dict(), "model_type": "llama"})
    with quiet_libraries():
        return AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, config=config, dtype=torch.float32
        )


def read_gguf_tokenizer(file: Path) -> Any:
    """The tokenizer of a GGUF file, as transformers reads it.

    It does not read where llama.cpp puts a space for SentencePiece's tokenizers; that is put right.
    """
    with quiet_libraries():
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    with_space = gguf.GGUFReader(file).get_field("tokenizer.ggml.add_space_prefix")
    if with_space is not None:
        backend = as_llama_cpp(tokenizer.backend_tokenizer, with_space=with_space.contents())
        tokenizer.backend_tokenizer.normalizer = backend.normalizer
        tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer


def _named(
    checkpoint: Checkpoint, config: Any
) -> Iterator[tuple[str, Tensor, Callable[[], Tensor]]]:
    """Name in the file, size, and what reads it in float32, for every weight."""
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for source, size in checkpoint.sizes.items():
        if config.tie_word_embeddings and source == "lm_head.weight":
            continue
        target = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ModelError(
                f"merge.gguf: a {config.model_type} model in GGUF has no weight {source}",
                remedy="use llama.cpp's own script",
            )
        yield target, size, _reader(checkpoint, config, source)
    if config.rope_parameters.get("rope_type") == "llama3":
        factors = _llama3_factors(config)
        yield "rope_freqs.weight", factors, lambda: factors


def _reader(checkpoint: Checkpoint, config: Any, source: str) -> Callable[[], Tensor]:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    module = source.split(".")[-2]
    is_llama = ARCHITECTURES[config.model_type] == gguf.MODEL_ARCH.LLAMA
    if not is_llama or module not in heads:
        return lambda: checkpoint.read(source, torch.float32)
    return lambda: _interleaved(checkpoint.read(source, torch.float32), heads[module])


def _interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of queries or keys in the order of llama.cpp's Llama, which turns neighbours together.

    transformers turns the first half of a head with the second.
    """
    half = weight.shape[0] // num_heads // 2
    parts = weight.reshape(num_heads, 2, half, *weight.shape[1:])
    return parts.swapaxes(1, 2).reshape(weight.shape)


def _llama3_factors(config: Any) -> Tensor:
    """By what Llama 3 divides each frequency of its rope: it stretches long waves only.

    The formula is that of transformers, modeling_rope_utils.
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
    """The type of one weight: vectors and odd rows cannot be quantized."""
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
