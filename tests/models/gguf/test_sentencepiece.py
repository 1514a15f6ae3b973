"""A SentencePiece tokenizer is in the GGUF file as llama.cpp needs it, or it is refused."""

import json
from collections import Counter
from functools import cache
from itertools import pairwise

import gguf
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from tests.models.conftest import TEXTS, tiny_config
from tests.models.gguf.test_write import write
from yrunner.commands.merge.export import prove_tokens
from yrunner.commands.merge.verify import FIXED_TEXTS
from yrunner.errors import ModelError, ProofError
from yrunner.models.gguf.read import open_gguf
from yrunner.models.gguf.tokenizer import (
    BYTES,
    SPACE,
    as_llama_cpp,
    check_tokenizer,
    piece_scores,
    read_tokenizer,
)

LLAMA_2 = (
    "{% for turn in messages %}{% if turn.role == 'user' %}"
    "{{ bos_token + '[INST] ' + turn.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + turn.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for turn in messages %}"
    "{{ '<|' + turn.role + '|>\n' + turn.content + eos_token + '\n' }}{% endfor %}"
)
SCHEMES = {
    "Llama 2's file": {"prepends": True},
    "Gemma's": {"like_gemma": True},
    "always": {"legacy": True},
    "never": {"add_prefix_space": False},
    "first, with chats": {"legacy": False, "chat_template": LLAMA_2},
    "first, without": {"legacy": False},
}


@cache
def pieces():
    """A small vocabulary in the order of SentencePiece, and its merges."""
    trained = Tokenizer(models.BPE(byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        [*TEXTS, *FIXED_TEXTS] * 2,
        trainers.BpeTrainer(vocab_size=400, max_token_length=5, show_progress=False),
    )
    found = sorted(trained.get_vocab(), key=trained.token_to_id)
    joined = [piece for piece in found if len(piece) > 1]
    characters = [piece for piece in found if len(piece) == 1]
    names = ["<unk>", "<s>", "</s>", *BYTES, *joined, *characters]
    vocabulary = {name: number for number, name in enumerate(names)}
    scores = {piece: -float(place) for place, piece in enumerate(joined)}
    return vocabulary, generate_merges(vocabulary, scores)


def pieces_tokenizer(*, prepends=False, like_gemma=False, **options):
    """A tokenizer as transformers makes it of a SentencePiece model."""
    vocabulary, merges = pieces()
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, **options)
    if prepends:
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
        backend.pre_tokenizer = None
    if like_gemma:
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Replace(" ", SPACE)
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        # Not as a LlamaTokenizer, which would restore Llama's spaces when it is loaded.
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    return tokenizer


def texts_of(tokenizer):
    """Chats where there is a template: those are what a space could get into."""
    if not tokenizer.chat_template:
        return [*FIXED_TEXTS, "Ä 🙂 two  blanks\n\tand   three"]
    turns = [("user", FIXED_TEXTS[0]), ("assistant", FIXED_TEXTS[1]), ("user", "Ä 🙂  ?")]
    chat = [{"role": role, "content": text} for role, text in turns]
    return [tokenizer.apply_chat_template(chat, tokenize=False)]


@pytest.fixture(params=SCHEMES.values(), ids=SCHEMES.keys())
def of_pieces(request):
    return pieces_tokenizer(**request.param)


def test_read_back_it_reads_the_same_tokens(of_pieces, card, tmp_path):
    file = write(tmp_path / "model", tiny_config("llama"), of_pieces, card)
    read = read_tokenizer(open_gguf(file).fields, "model.gguf")
    for text in texts_of(of_pieces):
        expected = of_pieces(text, add_special_tokens=False).input_ids
        assert read(text, add_special_tokens=False).input_ids == expected
        assert len(expected) > 10


def test_the_file_holds_pieces_with_types_and_scores(card, tmp_path):
    tokenizer = pieces_tokenizer(legacy=True)
    tokenizer.add_tokens("<think>")
    reader = gguf.GGUFReader(write(tmp_path / "model", tiny_config("llama"), tokenizer, card))
    found = {
        name: reader.get_field(f"tokenizer.ggml.{name}").contents()
        for name in ("model", "tokens", "token_type", "scores", "add_space_prefix", "add_bos_token")
    }
    assert (found["model"], found["add_space_prefix"], found["add_bos_token"]) == (
        "llama", True, True
    )  # fmt: skip
    kinds = gguf.TokenType
    types = dict(zip(found["tokens"], found["token_type"], strict=True))
    assert (types["<unk>"], types["</s>"]) == (kinds.UNKNOWN, kinds.CONTROL)
    assert (types["<0x0A>"], types["<think>"]) == (kinds.BYTE, kinds.USER_DEFINED)
    assert Counter(found["token_type"])[kinds.BYTE] == 256
    scores = dict(zip(found["tokens"], found["scores"], strict=True))
    first, *_, last = ("".join(merge) for merge in tokenizer._merges)
    assert scores[first] == 0
    assert scores[first] > scores[last] > scores["<s>"]


def test_joined_by_scores_the_pieces_are_those_of_the_merges():
    tokenizer = pieces_tokenizer(legacy=True)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    names = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    scores = dict(zip(names, piece_scores(content, names), strict=True))
    for text in FIXED_TEXTS:
        parts = list(SPACE + text.replace(" ", SPACE))
        while pairs := [
            (scores[joined], -place)
            for place, joined in enumerate(map("".join, pairwise(parts)))
            if joined in scores
        ]:
            place = -max(pairs)[1]
            parts[place : place + 2] = ["".join(parts[place : place + 2])]
        known = [part for part in parts if part in scores]
        expected = tokenizer.tokenize(text)
        assert known == [token for token in expected if token not in BYTES]


def test_a_space_that_llama_cpp_cannot_put_is_refused():
    check_tokenizer(pieces_tokenizer(legacy=True, chat_template=ZEPHYR))
    with pytest.raises(ModelError, match=r"a space before every part of a chat or before none"):
        check_tokenizer(pieces_tokenizer(legacy=False, chat_template=ZEPHYR))


def test_where_llama_cpp_reads_only_chats_alike_it_is_said(card, tmp_path, capfd):
    tokenizer = pieces_tokenizer(legacy=False, chat_template=LLAMA_2)
    file = write(tmp_path / "model", tiny_config("llama"), tokenizer, card)
    read = read_tokenizer(open_gguf(file).fields, "model.gguf")
    prove_tokens(read, tokenizer)
    assert (
        "does not add the leading space that this tokenizer adds to plain text"
        in capfd.readouterr().err
    )
    other = pieces_tokenizer(legacy=True, chat_template=LLAMA_2)
    with pytest.raises(ProofError, match=r'encodes "The harbour was quiet'):
        prove_tokens(read, other)


def test_merges_that_are_no_scores_are_refused():
    tokenizer = pieces_tokenizer(legacy=True)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    piece_scores(content, [])
    del content["model"]["merges"][5]
    with pytest.raises(ModelError, match="an order that scores cannot express"):
        piece_scores(content, [])
    del content["model"]["vocab"]["<0x0A>"]
    with pytest.raises(ModelError, match="lacks tokens for some bytes"):
        piece_scores(content, [])


def test_a_saved_tokenizer_keeps_its_way_with_spaces(of_pieces, tmp_path):
    of_pieces.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts_of(of_pieces):
        assert loaded(text).input_ids == of_pieces(text).input_ids


def test_behind_a_special_token_llama_cpp_puts_the_space_again():
    backend = pieces_tokenizer(legacy=False).backend_tokenizer
    found = as_llama_cpp(backend, with_space=True).encode("Q</s>Q", add_special_tokens=False)
    assert found.tokens == [SPACE, "<0x51>", "</s>", SPACE, "<0x51>"]
