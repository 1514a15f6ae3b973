"""A byte-level tokenizer has a name in llama.cpp, is restored from it exactly, or is refused."""

import json
from functools import partial

import gguf
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.models.conftest import TEXTS, tiny_config
from tests.models.gguf.test_write import write
from yrunner.commands.merge.export import prove_tokens
from yrunner.commands.merge.verify import FIXED_TEXTS
from yrunner.errors import ModelError, ProofError
from yrunner.models.gguf.read import open_gguf
from yrunner.models.gguf.tokenizer import (
    GPT_4O,
    LLAMA_3,
    SAME_SPLIT,
    SPLITS,
    TEKKEN,
    check_tokenizer,
    read_tokenizer,
)
from yrunner.models.scratch import WORD_PATTERN

TRIALS = [*FIXED_TEXTS, "In 1987, 12345 ships  didn't\tcome.\r\n\n ½ ²³ Ⅳ", "  x=1\n\n\n  y", "é"]

digits = pre_tokenizers.Digits
byte_level = partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
split = pre_tokenizers.Split
sequence = pre_tokenizers.Sequence
plain_bytes = byte_level(use_regex=False)

NAMED = {
    "gpt-2": byte_level(use_regex=True),
    "smollm": sequence([digits(individual_digits=True), byte_level(use_regex=True)]),
    "qwen2": sequence([split(Regex(WORD_PATTERN), "isolated"), plain_bytes]),
    "llama-bpe": sequence([split(Regex(LLAMA_3), "isolated"), plain_bytes]),
    "tekken": sequence([split(Regex(TEKKEN), "removed", invert=True), plain_bytes]),
    "gpt-4o": sequence([split(Regex(GPT_4O), "isolated"), plain_bytes]),
}
UNKNOWN = {
    "digits in groups": sequence([digits(individual_digits=False), byte_level(use_regex=True)]),
    "digits after words": sequence([byte_level(use_regex=True), digits(individual_digits=True)]),
    "punctuation first": sequence([pre_tokenizers.Punctuation(), byte_level(use_regex=True)]),
    "a space before every text": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "another pattern": sequence([split(Regex(r"\p{N}{1,2}|\P{N}+"), "isolated"), plain_bytes]),
    "the pattern left out": sequence([split(Regex(LLAMA_3), "removed"), plain_bytes]),
    "whole texts": plain_bytes,
    "words without bytes": pre_tokenizers.Whitespace(),
}


def trained(pre_tokenizer, *, normalizer=None, whole_words=False, added=()):
    """A byte-level BPE of 320 tokens that splits texts this way."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    backend.train_from_iterator([*TEXTS, *TRIALS], trainer)
    content = json.loads(backend.to_str())
    content["model"]["ignore_merges"] = whole_words
    backend = Tokenizer.from_str(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    return tokenizer


@pytest.mark.parametrize("name", NAMED)
def test_a_named_split_is_restored_from_its_name(name, card, tmp_path):
    whole_words = name in ("llama-bpe", "tekken")
    tokenizer = trained(NAMED[name], whole_words=whole_words)
    file = open_gguf(write(tmp_path / "model", tiny_config("llama"), tokenizer, card))
    assert file.fields["tokenizer.ggml.pre"] == name
    read = read_tokenizer(file.fields, "model.gguf")
    for text in TRIALS:
        ids = tokenizer(text).input_ids
        assert read(text).input_ids == ids
        assert read.decode(ids) == text
    assert read.get_vocab() == tokenizer.get_vocab()


def test_every_other_name_is_that_of_a_known_split():
    assert set(SAME_SPLIT.values()) <= set(SPLITS)
    assert not set(SAME_SPLIT) & set(SPLITS)


@pytest.mark.parametrize("steps", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_any_other_split_is_refused_before_anything_is_merged(steps):
    with pytest.raises(ModelError, match="does not support how this tokenizer splits"):
        check_tokenizer(trained(steps))


@pytest.mark.parametrize(
    ("normalizer", "name"),
    [
        (normalizers.Lowercase(), "Lowercase"),
        (normalizers.NFKC(), "NFKC"),
        (normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]), "Strip"),
        (normalizers.Replace("ä", "ae"), "Replace"),
    ],
)
def test_a_normalizer_that_llama_cpp_lacks_is_refused(normalizer, name):
    with pytest.raises(ModelError, match=f"does not support the normalizer {name}"):
        check_tokenizer(trained(NAMED["qwen2"], normalizer=normalizer))
    check_tokenizer(trained(NAMED["qwen2"], normalizer=normalizers.NFC()))


def test_a_tokenizer_that_is_no_bpe_is_refused():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(ModelError, match="a WordPiece tokenizer cannot be written"):
        check_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))


def with_whole_word(name):
    """A tokenizer with a word that no merge makes."""
    content = json.loads(trained(NAMED[name]).backend_tokenizer.to_str())
    content["model"]["vocab"]["Ġharbourmaster"] = len(content["model"]["vocab"])
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_a_word_that_only_one_side_takes_whole_is_refused():
    check_tokenizer(trained(NAMED["tekken"]))  # every token of several bytes is made by a merge
    with pytest.raises(ModelError, match="merges the words of this tokenizer differently"):
        check_tokenizer(with_whole_word("tekken"))


def test_words_that_are_always_merged_have_a_name_of_their_own(card, tmp_path):
    tokenizer = with_whole_word("llama-bpe")
    file = open_gguf(write(tmp_path / "model", tiny_config("llama"), tokenizer, card))
    assert file.fields["tokenizer.ggml.pre"] == "dbrx"
    read = read_tokenizer(file.fields, "model.gguf")
    ids = tokenizer("the harbourmaster").input_ids
    assert read("the harbourmaster").input_ids == ids
    assert tokenizer.convert_tokens_to_ids("Ġharbourmaster") not in ids


@pytest.mark.parametrize("mark", ["<｜User｜>", "<｜end▁of▁sentence｜>", "〈终〉", "<|é|>"])
def test_special_tokens_beyond_ascii_are_written_and_read_as_they_are(mark, card, tmp_path):
    tokenizer = trained(NAMED["smollm"], added=[mark])
    file = open_gguf(write(tmp_path / "model", tiny_config("llama"), tokenizer, card))
    read = read_tokenizer(file.fields, "model.gguf")
    prove_tokens(read, tokenizer)
    text = f"{mark}who?{mark}\n1873"
    assert read(text).input_ids == tokenizer(text).input_ids
    assert read.convert_tokens_to_ids(mark) in tokenizer(text).input_ids


def test_another_token_in_the_file_is_a_failed_proof(card, tmp_path):
    tokenizer = trained(NAMED["smollm"], added=["<｜User｜>"])
    other = trained(NAMED["smollm"], added=["<｜user｜>"])
    file = open_gguf(write(tmp_path / "model", tiny_config("llama"), other, card))
    with pytest.raises(ProofError, match="other tokens than the tokenizer"):
        prove_tokens(read_tokenizer(file.fields, "model.gguf"), tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "falcon"}, 'splits texts into words as "falcon"'),
        ({"tokenizer.ggml.pre": None}, 'splits texts into words as "default"'),
        ({"tokenizer.ggml.model": "bert"}, "a tokenizer of the kind bert"),
        ({"tokenizer.ggml.model": None}, "x.gguf has no tokenizer"),
        ({"tokenizer.ggml.token_type": [1]}, "which cannot be restored"),
    ],
)
def test_a_tokenizer_that_cannot_be_restored_is_refused_by_name(changes, message, card, tmp_path):
    file = write(tmp_path / "model", tiny_config("llama"), trained(NAMED["gpt-2"]), card)
    fields = {**open_gguf(file).fields, **changes}
    fields = {key: value for key, value in fields.items() if value is not None}
    with pytest.raises(ModelError, match=message):
        read_tokenizer(fields, "x.gguf")


def test_bos_comes_first_where_the_file_says_so(card, tmp_path):
    tokenizer = trained(NAMED["gpt-2"], added=["<bos>"])
    tokenizer.bos_token = "<bos>"
    fields = open_gguf(write(tmp_path / "model", tiny_config("llama"), tokenizer, card)).fields
    assert read_tokenizer(fields, "x.gguf")("a").input_ids == tokenizer("a").input_ids
    with_bos = read_tokenizer({**fields, "tokenizer.ggml.add_bos_token": True}, "x.gguf")
    assert with_bos("a").input_ids == [tokenizer.bos_token_id, *tokenizer("a").input_ids]


def test_tokens_are_control_tokens_or_user_defined_as_the_file_says(card, tmp_path):
    tokenizer = trained(NAMED["gpt-2"], added=["<|call|>"])
    tokenizer.add_tokens("<think>")
    fields = open_gguf(write(tmp_path / "model", tiny_config("llama"), tokenizer, card)).fields
    read = read_tokenizer(fields, "x.gguf")
    added = {token.content: token.special for token in read.added_tokens_decoder.values()}
    assert added["<|call|>"] and not added["<think>"]
    place = fields["tokenizer.ggml.tokens"].index("<|call|>")
    assert fields["tokenizer.ggml.token_type"][place] == gguf.TokenType.CONTROL
