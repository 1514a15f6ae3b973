"""SentencePiece tokenizers in GGUF: a score for every piece, and whether texts begin with a space.

transformers keeps such a tokenizer as merges in their order. llama.cpp keeps none: it joins two
pieces wherever the result is a piece, the one with the highest score first. And it puts a space
before every stretch between special tokens, or before none.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import gguf
from tokenizers import Tokenizer

from yrunner.errors import ModelError

SPACE = "▁"
BYTES = [f"<0x{number:02X}>" for number in range(256)]
REMEDY = "use llama.cpp's own script"
CHAT = (
    {"role": "user", "content": "灯塔归谁管？ Who keeps it?"},
    {"role": "assistant", "content": "市政厅。 The town hall."},
    {"role": "user", "content": "1873"},
)


def is_of_pieces(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json holds SentencePiece's pieces, with bytes for unknown characters."""
    model = content["model"]
    return model["type"] == "BPE" and bool(model.get("byte_fallback"))


def begins_with_space(tokenizer: Any) -> bool:
    """Whether llama.cpp has to put a space before texts to read them as this tokenizer does.

    Chats decide where there is a template: many tokenizers put a space before a text but none
    behind a special token. Raises `ModelError` where neither way reads the same.
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
    """This tokenizer with llama.cpp's way to treat spaces and special tokens."""
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


def piece_scores(content: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """A score for every token: the sooner its pieces are joined, the higher.

    Raises `ModelError` where joining by scores is not the same as by the merges.
    """
    vocabulary = set(content["model"]["vocab"])
    added = {token["content"] for token in content["added_tokens"]}
    if not vocabulary.issuperset(BYTES):
        raise ModelError("merge.gguf: this tokenizer lacks tokens for some bytes", remedy=REMEDY)
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge)
              for merge in content["model"]["merges"]]  # fmt: skip
    joined = [piece for piece, _ in groupby(merges, "".join)]
    places = {piece: place for place, piece in enumerate(joined)}
    if len(places) < len(joined) or not set(merges) >= _splits(vocabulary - added):
        raise ModelError(
            "merge.gguf: the merges of this tokenizer have an order that scores cannot express",
            remedy=REMEDY,
        )
    return [-float(places.get(token, len(places))) for token in tokens]


def piece_types(tokens: Sequence[str], types: Sequence[int], unknown: str | None) -> list[int]:
    """The types of all tokens, with those that only such a vocabulary has."""
    kinds = dict.fromkeys(BYTES, gguf.TokenType.BYTE)
    if unknown is not None:
        kinds[unknown] = gguf.TokenType.UNKNOWN
    return [int(kinds.get(token, kind)) for token, kind in zip(tokens, types, strict=True)]


def _splits(pieces: set[str]) -> set[tuple[str, str]]:
    """Every way to put a piece together from two others."""
    return {
        (piece[:end], piece[end:])
        for piece in pieces
        for end in range(1, len(piece))
        if piece[:end] in pieces and piece[end:] in pieces
    }


def _ids(backend: Tokenizer, text: str) -> list[int]:
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids
