"""What a GGUF file says of a model besides its weights: its form, its tokens, its chat template."""

import json
from collections.abc import Mapping
from typing import Any

import gguf

from yrunner.errors import ModelError
from yrunner.models.gguf_pieces import (
    begins_with_space,
    is_of_pieces,
    piece_scores,
    piece_types,
)
from yrunner.models.load import find_stop_ids
from yrunner.models.scratch import WORD_PATTERN

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""llama.cpp's architecture by the model_type of transformers; Mistral has the form of Llama."""

SPLITS = {
    WORD_PATTERN: "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
"""llama.cpp knows the patterns that split texts into words by names of its own."""


def check_supported(config: Any) -> None:
    """Raise `ModelError` for a model that llama.cpp would not compute as transformers does."""
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"merge.gguf: a {config.model_type} model cannot be written as GGUF",
            remedy=f"it can for {', '.join(ARCHITECTURES)}; for others use llama.cpp's own script",
        )
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ModelError(
            f"merge.gguf: rope of the type {kind} cannot be written as GGUF",
            remedy="use llama.cpp's own script",
        )
    if getattr(config, "use_sliding_window", False):
        raise ModelError(
            "merge.gguf: llama.cpp does not know the sliding window of this model",
            remedy="set use_sliding_window to false in its config.json if its texts are short",
        )


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `ModelError` for a tokenizer that reads texts in a way unknown to llama.cpp."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if is_of_pieces(content):
        piece_scores(content, [])
        begins_with_space(tokenizer)
    else:
        _split_name(content)


def add_form(writer: gguf.GGUFWriter, config: Any) -> None:
    """Sizes, norms and rope of the model."""
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


def add_tokens(writer: gguf.GGUFWriter, tokenizer: Any, num_embeddings: int) -> None:
    """Vocabulary, merges or scores, special tokens and chat template.

    Raises `ModelError` for a tokenizer that llama.cpp has no word for.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, types = _tokens(tokenizer, num_embeddings)
    if is_of_pieces(content):
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


def _split_name(content: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer splits texts into words."""
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
        "merge.gguf: llama.cpp has no name for the way this tokenizer splits texts",
        remedy="use llama.cpp's own script",
    )


def _as_merge(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)
