"""The tokenizer of a GGUF file: what llama.cpp calls it, and how it becomes tokenizer.json again.

Tokenizers are of two kinds. Byte-level BPE: the merges are copied, and how texts are split into
words must have a name in llama.cpp. SentencePiece: transformers has ordered merges, llama.cpp a
score for every piece; it joins two pieces whenever the result is a piece, the highest score first,
and puts a space before every text between special tokens, or before none.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from yrunner.errors import ModelError
from yrunner.models.load import find_stop_ids
from yrunner.models.scratch import WORD_PATTERN

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Also that of Phi-4-mini; Phi-4 has Llama 3's."""
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
GPT_2 = BYTE_LEVEL | {"use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [GPT_2],
    "smollm": [DIGITS, GPT_2],
    "qwen2": [_split(WORD_PATTERN), BYTE_LEVEL],
    "llama-bpe": [_split(LLAMA_3), BYTE_LEVEL],
    "tekken": [_split(TEKKEN), BYTE_LEVEL],
    "gpt-4o": [_split(GPT_4O), BYTE_LEVEL],
}
"""How texts are split into words, as steps of a tokenizer.json, by llama.cpp's name.

Source: the regular expressions of llama.cpp's src/llama-vocab.cpp."""
SAME_SPLIT = {
    **dict.fromkeys(("mpt", "olmo", "jais", "phi-2", "trillion"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone"), "smollm"),
    **dict.fromkeys(("stablelm2", "megrez", "hunyuan"), "qwen2"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral"), "llama-bpe"),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), "llama-bpe"),
    **dict.fromkeys(("llama4", "kanana2"), "gpt-4o"),
}
"""Other names of the same splits."""
WHOLE_WORDS = ("llama-bpe", "tekken", "llama3", "llama-v3", "falcon3", "pixtral", "glm4")
"""Where llama.cpp takes a word that is a token whole, without its merges (`ignore_merges`)."""
ALWAYS_MERGED = {"llama-bpe": "dbrx"}
"""The name of the same split where words are always merged, if llama.cpp has one."""
SPACE = "▁"
BYTES = [f"<0x{number:02X}>" for number in range(256)]
GEMMA_SPLIT = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
"""A step of Gemma's tokenizers that never finds its space: the normalizer has replaced it."""
CHAT = (
    {"role": "user", "content": "灯塔归谁管？ Who keeps it?"},
    {"role": "assistant", "content": "市政厅。 The town hall."},
    {"role": "user", "content": "1873"},
)
REMEDY = "use llama.cpp's script"


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `ModelError` for a tokenizer that llama.cpp does not support."""
    content = _content(tokenizer)
    if is_sentencepiece(content):
        _check_steps(content, "normalizer", ("Prepend", "Replace"))
        _check_steps(content, "pre_tokenizer", ("Metaspace",), idle=GEMMA_SPLIT)
        piece_scores(content, [])
        begins_with_space(tokenizer)
    else:
        split_name(content)


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
        writer.add_tokenizer_pre(split_name(content))
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


def read_tokenizer(fields: Mapping[str, Any], name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, from its metadata.

    `fields`: values by key. `name`: of the file, for messages. Raises `ModelError` for a kind of
    tokenizer that cannot be restored exactly.
    """
    key = "tokenizer.ggml."
    kind = fields.get(f"{key}model")
    tokens, types = fields.get(f"{key}tokens"), fields.get(f"{key}token_type")
    if kind not in ("gpt2", "llama") or not tokens or not types or len(tokens) != len(types):
        raise ModelError(
            f"{name} has a tokenizer of the kind {kind}, which cannot be restored"
            if kind
            else f"{name} has no tokenizer",
            remedy="use the model's folder in Hugging Face format",
        )
    used = {
        token: number
        for number, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ != gguf.TokenType.UNUSED
    }
    content = _pieces(fields, used) if kind == "llama" else _byte_level(fields, used, name)
    backend = Tokenizer.from_str(json.dumps(content))
    for token, number in used.items():
        if types[number] in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            special = types[number] == gguf.TokenType.CONTROL
            added = AddedToken(token, normalized=False, special=special)
            (backend.add_special_tokens if special else backend.add_tokens)([added])
    special_tokens = {
        f"{part}_token": tokens[fields[f"{key}{long}_token_id"]]
        for part, long in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if fields.get(f"{key}{long}_token_id", len(tokens)) < len(tokens)
    }
    # llama.cpp's default: SentencePiece begins with bos, byte-level BPE does not.
    if fields.get(f"{key}add_bos_token", kind == "llama") and "bos_token" in special_tokens:
        backend.post_processor = _bos_first(special_tokens["bos_token"], used)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special_tokens
    )
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def _byte_level(
    fields: Mapping[str, Any], vocabulary: Mapping[str, int], name: str
) -> dict[str, Any]:
    """A tokenizer.json of byte-level BPE."""
    split = fields.get("tokenizer.ggml.pre", "default")
    steps = SPLITS.get(SAME_SPLIT.get(split, split))
    if steps is None:
        raise ModelError(
            f'{name} splits texts into words as "{split}", which cannot be restored',
            remedy="use the model's folder in Hugging Face format",
        )
    model = {
        "type": "BPE",
        "vocab": vocabulary,
        "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        "ignore_merges": split in WHOLE_WORDS,
    }
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    return {
        # llama.cpp leaves Unicode as it is; Qwen's own tokenizer composes it.
        "normalizer": {"type": "NFC"} if split == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_whole(step) for step in steps]},
        "decoder": decoder | {"use_regex": True},
        "model": model,
    }


def _whole(step: dict[str, Any]) -> dict[str, Any]:
    return step | {"trim_offsets": True} if step["type"] == "ByteLevel" else step


def _pieces(fields: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[str, Any]:
    """A tokenizer.json of a SentencePiece BPE."""
    scores, types = fields["tokenizer.ggml.scores"], fields["tokenizer.ggml.token_type"]
    normal = {token for token, number in vocabulary.items() if types[number] == 1}
    merges = sorted(
        _splits(normal),
        key=lambda pair: (-scores[vocabulary["".join(pair)]], vocabulary[pair[0]]),
    )
    with_space = fields.get("tokenizer.ggml.add_space_prefix", True)
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if with_space else []
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *strip,
    ]
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    return {
        "normalizer": _spaces(with_space=with_space),
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [list(pair) for pair in merges],
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": None if unknown is None else fields["tokenizer.ggml.tokens"][unknown],
        },
    }


def _bos_first(bos: str, vocabulary: Mapping[str, int]) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single=f"{bos}:0 $A:0",
        pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
        special_tokens=[(bos, vocabulary[bos])],
    )


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


def split_name(content: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a byte-level BPE splits texts into words.

    Raises `ModelError` for any other tokenizer.
    """
    model = content["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"merge.gguf: a {model['type']} tokenizer cannot be written as GGUF", remedy=REMEDY
        )
    _check_steps(content, "normalizer", ("NFC",))
    steps = [_plain(step) for step in _steps(content, "pre_tokenizer")]
    found = [name for name, known in SPLITS.items() if steps == known]
    affixes = [model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")]
    if not found or any(affixes):
        kinds = ", ".join(step["type"] for step in steps) or "none"
        raise ModelError(
            "merge.gguf: llama.cpp does not support how this tokenizer splits texts into words "
            f"(steps: {kinds})",
            remedy=REMEDY,
        )
    merges_always = not model.get("ignore_merges")
    if merges_always == (found[0] in WHOLE_WORDS) and _unmerged(content):
        if merges_always and found[0] in ALWAYS_MERGED:
            return ALWAYS_MERGED[found[0]]
        raise ModelError(
            "merge.gguf: llama.cpp merges the words of this tokenizer differently", remedy=REMEDY
        )
    return found[0]


def _steps(content: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """The normalizer's or pre-tokenizer's steps, sequences flattened."""
    step = content.get(part)
    if step is None:
        return []
    inner = step.get("normalizers", step.get("pretokenizers"))
    if inner is None:
        return [step]
    return [each for one in inner for each in _steps({part: one}, part)]


def _check_steps(
    content: Mapping[str, Any],
    part: str,
    known: Sequence[str],
    idle: Mapping[str, Any] | None = None,
) -> None:
    """Raise `ModelError` for a step of another type, unless it does nothing."""
    for step in _steps(content, part):
        if step["type"] not in known and step != idle:
            raise ModelError(
                f"merge.gguf: llama.cpp does not support the {part.replace('_', '-')} "
                f"{step['type']} of this tokenizer",
                remedy=REMEDY,
            )


def _plain(step: dict[str, Any]) -> dict[str, Any]:
    """A step without options that change no ids, in one spelling of equal ones."""
    step = {key: value for key, value in step.items() if key != "trim_offsets"}
    if step["type"] == "ByteLevel":
        step.setdefault("use_regex", True)
    if step["type"] == "Split" and (step["behavior"], step["invert"]) == ("Removed", True):
        step |= {"behavior": "Isolated", "invert": False}
    return step


def _unmerged(content: Mapping[str, Any]) -> set[str]:
    """Tokens of several characters that no merge makes."""
    model = content["model"]
    made = {_as_merge(merge).replace(" ", "") for merge in model["merges"]}
    added = {token["content"] for token in content["added_tokens"]}
    return {token for token in model["vocab"] if len(token) > 1} - made - added


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
    content["normalizer"] = _spaces(with_space=with_space)
    content["pre_tokenizer"] = None
    for token in content["added_tokens"]:
        token.update(normalized=False, lstrip=False, rstrip=False, single_word=False)
    return Tokenizer.from_str(json.dumps(content))


def _spaces(*, with_space: bool) -> dict[str, Any]:
    """llama.cpp's treatment of spaces, as a normalizer."""
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    ]
    if with_space:
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _ids(backend: Tokenizer, text: str) -> list[int]:
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids
