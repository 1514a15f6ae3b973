"""Tokens become text that loses nothing: whole characters, blanks, names of special tokens."""

import pytest

from yrunner.reports.token_text import TokenText, visible

TEXTS = [
    "根据《港口法典》，",
    "😀 Belo is 🇨🇳 the capital.",
    "<|im_start|>user\n港<|im_end|>",
    "",
    " \t\n\n x",
]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_are_whole_and_hold_every_token_once_in_order(capitals_tokenizer, text):
    ids = capitals_tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = TokenText(capitals_tokenizer)
    characters = list(tokens.characters(ids))
    assert [id_ for character in characters for id_ in character] == ids
    shown = [tokens.decode(character) for character in characters]
    assert "".join(shown) == text
    assert not [part for part in shown if "\ufffd" in part]


def test_bytes_that_make_no_character_are_still_shown(capitals_tokenizer):
    ids = capitals_tokenizer("港", add_special_tokens=False)["input_ids"][:2]
    end = capitals_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert list(TokenText(capitals_tokenizer).characters([*ids, end])) == [ids, [end]]
    many = list(TokenText(capitals_tokenizer).characters([ids[0]] * 20))
    assert [len(character) for character in many] == [8, 8, 4]


def test_line_ends_and_harmful_characters_are_visible():
    assert visible("a\r\nb\u202e\x1b") == "a\\r↵\nb\\u202e\\x1b"
