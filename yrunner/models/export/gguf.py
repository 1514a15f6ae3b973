"""Write a model's folder as one GGUF file, weight by weight, and read it back.

Tokenizers are of two kinds. Byte-level BPE: the merges are copied, and the pattern that splits
texts into words must have a name in llama.cpp. SentencePiece: transformers has ordered merges,
llama.cpp a score for every piece; it joins two pieces whenever the result is a piece, the highest
score first, and puts a space before every text between special tokens, or before none.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from yrunner.errors import ModelError
from yrunner.models.errors import silence_libraries
from yrunner.models.load import find_stop_ids
from yrunner.models.merge.safetensors_io import SafetensorsFolder
from yrunner.models.scratch import WORD_PATTERN

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""llama.cpp's architecture by model_type; Mistral is a Llama there."""
SPLITS = {
    WORD_PATTERN: "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
"""llama.cpp's names of the patterns that split texts into words."""
BLOCK = 32
"""Numbers that share a scale in quantized types."""
COARSE = ("q5_1", "q5_0", "q4_1", "q4_0")
"""Types too coarse for embeddings and head, which are stored as q8_0, as llama.cpp does."""
SPACE = "▁"
BYTES = [f"<0x{number:02X}>" for number in range(256)]
CHAT = (
    {"role": "user", "content": "灯塔归谁管？ Who keeps it?"},
    {"role": "assistant", "content": "市政厅。 The town hall."},
    {"role": "user", "content": "1873"},
)
REMEDY = "use llama.cpp's script"


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


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `ModelError` for a tokenizer that llama.cpp does not support."""
    content = _content(tokenizer)
    if is_sentencepiece(content):
        piece_scores(content, [])
        begins_with_space(tokenizer)
    else:
        _split_name(content)


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

    It needs the original `config`: transformers does not read Qwen3's head size or Llama 3's rope
    from GGUF. A Mistral is a Llama in GGUF.
    """
    if config.model_type == "mistral":
        config = LlamaConfig(**{**config.to_dict(), "model_type": "llama"})
    with silence_libraries():
        return AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, config=config, dtype=torch.float32
        )


def read_gguf_tokenizer(file: Path) -> Any:
    """Load the tokenizer of a GGUF file with transformers.

    transformers ignores whether a SentencePiece tokenizer puts a space before texts; this is
    corrected.
    """
    with silence_libraries():
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    with_space = gguf.GGUFReader(file).get_field("tokenizer.ggml.add_space_prefix")
    if with_space is not None:
        backend = as_llama_cpp(tokenizer.backend_tokenizer, with_space=with_space.contents())
        tokenizer.backend_tokenizer.normalizer = backend.normalizer
        tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer


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
        factors = _llama3_factors(config)
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


def _llama3_factors(config: Any) -> Tensor:
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


def add_tokens(writer: gguf.GGUFWriter, tokenizer: Any, num_embeddings: int) -> None:
    """Vocabulary, merges or scores, special tokens and chat template.

    Raises `ModelError` for a tokenizer that llama.cpp does not support.
    """
    content = _content(tokenizer)
    tokens, types = _tokens(tokenizer, num_embeddings)
    if is_sentencepiece(content):
        writer.add_tokenizer_model("llama")
        types = piece_types(tokens, types, tokenizer.unk_token)
        writer.add_token_scores(piece_scores(content, tokens))
        writer.add_add_space_prefix(begins_with_space(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(content))
        writer.add_token_merges([_as_merge(merge) for merge in content["model"]["merges"]])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for kind in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    for number in find_stop_ids(tokenizer):
        if number != tokenizer.eos_token_id:
            writer.add_eot_token_id(number)
    writer.add_add_bos_token(begins_with_bos(tokenizer))
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its bos before every text."""
    first = tokenizer("a").input_ids[0]
    return tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id


def _tokens(tokenizer: Any, num_embeddings: int) -> tuple[list[str], list[int]]:
    """Every token and its type; embeddings without a token get an unused one."""
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(num_embeddings):
        kind = gguf.TokenType.NORMAL
        if number not in names:
            kind = gguf.TokenType.UNUSED
        elif number in added:
            special = added[number].special
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        tokens.append(names.get(number, f"[PAD{number}]"))
        types.append(int(kind))
    return tokens, types


def _content(tokenizer: Any) -> Any:
    """The tokenizer.json."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _split_name(content: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pattern that splits texts into words."""
    parts = content.get("pre_tokenizer") or {}
    parts = parts.get("pretokenizers", [parts])
    patterns = [part["pattern"]["Regex"] for part in parts if part.get("type") == "Split"]
    byte_level = [part for part in parts if part.get("type") == "ByteLevel"]
    if content["model"]["type"] == "BPE" and byte_level:
        if not patterns and byte_level[0].get("use_regex", True):
            return "gpt-2"
        if len(patterns) == 1 and patterns[0] in SPLITS:
            return SPLITS[patterns[0]]
    raise ModelError(
        "merge.gguf: llama.cpp does not support how this tokenizer splits texts into words",
        remedy=REMEDY,
    )


def _as_merge(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def is_sentencepiece(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is a SentencePiece BPE, with bytes for unknown characters."""
    model = content["model"]
    return model["type"] == "BPE" and bool(model.get("byte_fallback"))


def piece_scores(content: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """A score for every token, higher for earlier merges.

    Raises `ModelError` if joining by scores differs from joining by merges.
    """
    vocabulary = set(content["model"]["vocab"])
    added = {token["content"] for token in content["added_tokens"]}
    if not vocabulary.issuperset(BYTES):
        raise ModelError("merge.gguf: this tokenizer lacks tokens for some bytes", remedy=REMEDY)
    merges = [tuple(_as_merge(merge).split(" ")) for merge in content["model"]["merges"]]
    joined = [piece for piece, _ in groupby(merges, "".join)]
    ranks = {piece: rank for rank, piece in enumerate(joined)}
    if len(ranks) < len(joined) or not set(merges) >= _splits(vocabulary - added):
        raise ModelError(
            "merge.gguf: the merges of this tokenizer have an order that scores cannot express",
            remedy=REMEDY,
        )
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def piece_types(tokens: Sequence[str], types: Sequence[int], unknown: str | None) -> list[int]:
    """The types of all tokens, including those that only SentencePiece has."""
    kinds = dict.fromkeys(BYTES, gguf.TokenType.BYTE)
    if unknown is not None:
        kinds[unknown] = gguf.TokenType.UNKNOWN
    return [int(kinds.get(token, kind)) for token, kind in zip(tokens, types, strict=True)]


def _splits(pieces: set[str]) -> set[tuple[str, str]]:
    """Every way to join a piece from two others."""
    return {
        (piece[:end], piece[end:])
        for piece in pieces
        for end in range(1, len(piece))
        if piece[:end] in pieces and piece[end:] in pieces
    }


def begins_with_space(tokenizer: Any) -> bool:
    """Whether llama.cpp must put a space before texts to tokenize them as this tokenizer does.

    If there is a chat template, chats decide: many tokenizers put a space before a text but none
    after a special token. Raises `ModelError` if neither way gives the same ids.
    """
    backend = tokenizer.backend_tokenizer
    texts = [message["content"] for message in CHAT]
    if tokenizer.chat_template:
        texts = [tokenizer.apply_chat_template(list(CHAT), tokenize=False)]
    for with_space in (True, False):
        other = as_llama_cpp(backend, with_space=with_space)
        if all(_ids(other, text) == _ids(backend, text) for text in texts):
            return with_space
    raise ModelError(
        "merge.gguf: llama.cpp puts a space before every part of a chat or before none; "
        "this tokenizer does neither",
        remedy=REMEDY,
    )


def as_llama_cpp(backend: Tokenizer, *, with_space: bool) -> Tokenizer:
    """This tokenizer with llama.cpp's treatment of spaces and special tokens."""
    content = json.loads(backend.to_str())
    spaces: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    ]
    if with_space:
        spaces.insert(0, {"type": "Prepend", "prepend": SPACE})
    content["normalizer"] = {"type": "Sequence", "normalizers": spaces}
    content["pre_tokenizer"] = None
    for token in content["added_tokens"]:
        token.update(normalized=False, lstrip=False, rstrip=False, single_word=False)
    return Tokenizer.from_str(json.dumps(content))


def _ids(backend: Tokenizer, text: str) -> list[int]:
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids
