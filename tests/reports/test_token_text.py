"""Tokens as readable text: whole characters, and visible control characters."""

import pytest

from yrunner.data.conversation import TokenizedExample
from yrunner.reports.token_text import Piece, TokenText, pieces_of, top_texts, visible
from yrunner.tokens import IGNORE_INDEX

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


CHAT = "<|im_start|>user\nCapital?<|im_end|>\n<|im_start|>assistant\n"


def test_context_is_joined_and_each_target_is_a_piece_of_its_own(capitals_tokenizer, tokenize):
    example = tokenize(CHAT, "根 Belo<|im_end|>", "\nBye")
    pieces = pieces_of(example, TokenText(capitals_tokenizer))
    assert [piece for piece in pieces if not piece.num_targets] == [
        Piece("<|im_start|>", True, 0),
        Piece("user↵\nCapital?", False, 0),
        Piece("<|im_end|>", True, 0),
        Piece("↵\n", False, 0),
        Piece("<|im_start|>", True, 0),
        Piece("assistant↵\n", False, 0),
        Piece("↵\nBye", False, 0),
    ]
    targets = [piece for piece in pieces if piece.num_targets]
    assert targets[0] == Piece("根", False, 3), "the tokenizer knows no Chinese"
    assert targets[-1] == Piece("<|im_end|>", True, 1)
    assert sum(piece.num_targets for piece in targets) == len(example.target_positions)


def test_a_border_inside_a_character_counts_the_targets_of_it_only(capitals_tokenizer, tokenize):
    example = tokenize("港")
    labels = [IGNORE_INDEX, *example.input_ids[1:]]
    split = TokenizedExample(example.input_ids, labels, example.origin)
    assert pieces_of(split, TokenText(capitals_tokenizer)) == [Piece("港", False, 2)]


def test_a_top_answer_inside_a_character_is_the_character_that_it_would_make(
    capitals_tokenizer, tokenize
):
    text = TokenText(capitals_tokenizer)
    harbour, other = (
        capitals_tokenizer(sign, add_special_tokens=False)["input_ids"] for sign in ("港", "渰")
    )
    example = tokenize("?", "港")
    assert harbour[0] == other[0]
    assert top_texts(example, [*harbour], text) == ["", "", "港"]
    (whole,) = capitals_tokenizer("?", add_special_tokens=False)["input_ids"]
    changed = capitals_tokenizer.decode([*harbour[:2], other[2]])
    assert top_texts(example, [whole, other[1], other[2]], text) == ["?", "", changed]


def test_special_and_harmful_top_answers_are_shown_by_name(capitals_tokenizer, tokenize):
    text = TokenText(capitals_tokenizer)
    (end,) = capitals_tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]
    (line,) = capitals_tokenizer("\n", add_special_tokens=False)["input_ids"]
    (escape,) = capitals_tokenizer("\x1b", add_special_tokens=False)["input_ids"]
    example = tokenize("?", "???")
    assert len(example.target_positions) == 3
    shown = top_texts(example, [end, line, escape], text)
    assert shown == ["<|im_end|>", "↵\n", "\\x1b"]
