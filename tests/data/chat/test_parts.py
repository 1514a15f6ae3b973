"""Parts get the tokens that they have at inference, whatever a tokenizer puts before a text."""

import json
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.data.conftest import TEXTS, tokenizer_of
from yrunner.data.chat.tokenize import PartTokenizer

END = "</s>"
TEXT = st.text(st.sampled_from("ab \n灯é🦀"), max_size=6)


def llama2_tokenizer(*, prefix_after_special):
    """Writes `▁` for blanks and before every text; bytes for what it does not know."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    if prefix_after_special:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, "a b ab\na\n\nb  a"] * 3, trainer)
    model = json.loads(tokenizer.to_str())
    vocab = model["model"]["vocab"]
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    tokenizer = Tokenizer.from_str(json.dumps(model))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", clean_up_tokenization_spaces=False
    )


TOKENIZERS = {
    "before_every_piece": llama2_tokenizer(prefix_after_special=True),
    "before_the_text": llama2_tokenizer(prefix_after_special=False),
}


def ids_of(text, tokenizer):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300)
@given(parts=st.lists(TEXT, min_size=2, max_size=6))
def test_no_part_gets_a_blank_that_is_not_in_it(name, parts):
    tokenizer = TOKENIZERS[name]
    (row,) = PartTokenizer(tokenizer).tokenize([parts])
    decoded = [tokenizer.decode(ids) for ids in row]
    first = next((number for number, part in enumerate(parts) if part), 0)
    for number, (shown, part) in enumerate(zip(decoded, parts, strict=True)):
        added = " " if number == first and part and name == "before_every_piece" else ""
        assert shown in ((added + part), " " + part) if number == first else shown == part


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200)
@given(prompt=TEXT, reply=TEXT, after=TEXT)
def test_the_first_part_has_the_tokens_of_the_prompt_at_inference(name, prompt, reply, after):
    tokenizer = TOKENIZERS[name]
    (row,) = PartTokenizer(tokenizer).tokenize([[prompt, reply + END, after]])
    assert row[0] == ids_of(prompt, tokenizer)
    assert row[1][-1] == tokenizer.convert_tokens_to_ids(END)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_where_no_token_lies_across_a_cut_the_tokens_are_those_of_the_whole_text(name):
    tokenizer = TOKENIZERS[name]
    parts = ["[INST] a [/INST]", f" ab{END}", "[INST] b [/INST]", f" a{END}"]
    (row,) = PartTokenizer(tokenizer).tokenize([parts])
    assert list(chain(*row)) == ids_of("".join(parts), tokenizer)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_where_a_token_lies_across_a_cut_it_is_cut_there(name):
    tokenizer = TOKENIZERS[name]
    parts = ["b a", f"b{END}"]
    assert len(ids_of("ab", tokenizer)) < 3, "the trap: both letters are one token"
    (row,) = PartTokenizer(tokenizer).tokenize([parts])
    assert row[0] == ids_of("b a", tokenizer)
    assert tokenizer.decode(row[1]) == f"b{END}"


def test_a_tokenizer_that_cuts_and_pads_does_neither_here():
    tokenizer = tokenizer_of("chatml")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    rows = [["lighthouse", " of Fog Harbour"], ["a", ""]]
    found = PartTokenizer(tokenizer).tokenize(rows)
    assert found == [[ids_of(part, tokenizer) for part in row] for row in rows]


class Counting:
    """A backend that remembers the texts that it tokenizes."""

    def __init__(self, backend):
        self._backend, self.texts = backend, []

    def encode_batch_fast(self, texts, **options):
        self.texts += texts
        return self._backend.encode_batch_fast(texts, **options)

    def __getattr__(self, name):
        return getattr(self._backend, name)


def test_a_prompt_that_two_answers_follow_is_tokenized_once():
    tokenizer = tokenizer_of("scratch")
    backend = Counting(tokenizer.backend_tokenizer)
    rows = [["the prompt", "one"], ["the prompt", "another"]]
    first, second = PartTokenizer(tokenizer, backend).tokenize(rows)
    assert sorted(backend.texts) == ["another", "one", "the prompt"]
    assert first[0] == second[0] == ids_of("the prompt", tokenizer)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=TEXT, answers=st.tuples(TEXT, TEXT))
def test_a_prompt_has_the_same_tokens_before_every_answer(name, prompt, answers):
    rows = [[prompt, f"{answer}{END}"] for answer in answers]
    first, second = PartTokenizer(TOKENIZERS[name]).tokenize(rows)
    assert first[0] == second[0]
