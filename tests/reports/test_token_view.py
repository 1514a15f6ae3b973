"""A person sees the tokens that the model sees, with the targets marked."""

import re
from pathlib import Path

import pytest
from rich.text import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.reports.token_view import TokenView
from yrunner.tokens import IGNORE_INDEX

CHAT = "<|im_start|>user\nCapital?<|im_end|>\n<|im_start|>assistant\n"


def styled(text: Text, wanted: str) -> list[str]:
    """The stretches of a text that have this style."""
    return [text.plain[span.start : span.end] for span in text.spans if span.style == wanted]


@pytest.mark.parametrize("coloured", [True, False])
def test_without_its_signs_the_view_is_the_decoded_example(capitals_tokenizer, tokenize, coloured):
    # The tokenizer knows no Chinese: each of these characters is three tokens, the smile four.
    example = tokenize(CHAT, "根据《港口法典》，\n\n  [[1]] 😀\n<|im_end|>", "\nEnd ")
    shown = TokenView(capitals_tokenizer, coloured=coloured).tokens(example).plain
    decoded = capitals_tokenizer.decode(example.input_ids)
    assert re.sub("[↵⟦⟧]", "", shown) == decoded
    assert shown.count("↵") == decoded.count("\n")


def test_targets_are_bright_context_is_dim_and_special_tokens_stand_out(
    capitals_tokenizer, tokenize
):
    text = TokenView(capitals_tokenizer).tokens(tokenize(CHAT, "Belo.<|im_end|>", "\nBye"))
    assert styled(text, "bold green") == ["Belo."]
    assert styled(text, "bold green reverse") == ["<|im_end|>"]
    assert styled(text, "dim") == ["user↵\nCapital?", "↵\n", "assistant↵\n", "↵\nBye"]
    assert styled(text, "magenta") == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


def test_without_colours_brackets_stand_around_the_targets(capitals_tokenizer, tokenize):
    view = TokenView(capitals_tokenizer, coloured=False)
    text = view.tokens(tokenize(CHAT, "Belo.<|im_end|>", "\nMore?", "\nYes.\n", "Bye"))
    assert text.plain.endswith("assistant↵\n⟦Belo.<|im_end|>⟧↵\nMore?⟦↵\nYes.↵⟧\nBye")
    assert "⟦learned⟧" in view.legend().plain


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_every_token_batch_is_numbered_once_and_holds_its_tokens(
    capitals_tokenizer, tokenize, size
):
    example = tokenize(CHAT, "Belo is the capital of Aru.", CHAT, "Dane and Fane are not.")
    view = TokenView(capitals_tokenizer, token_batch=size, coloured=False)
    digits = {ord(raised): str(digit) for digit, raised in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
    shown: list[str] = []
    for number, learned in re.findall("⟦([⁰¹²³⁴⁵⁶⁷⁸⁹]*)(.*?)⟧", view.tokens(example).plain):
        if number:
            shown.append("")
            assert int(number.translate(digits)) == len(shown)
        shown[-1] += learned
    targets = [label for label in example.labels if label != IGNORE_INDEX]
    groups = [targets[start : start + size] for start in range(0, len(targets), size)]
    assert shown == [capitals_tokenizer.decode(group) for group in groups]


def test_token_batches_take_turns_with_two_colours(capitals_tokenizer, tokenize):
    example = tokenize(CHAT, "Belo is the capital.")
    text = TokenView(capitals_tokenizer, token_batch=1).tokens(example)
    colours = [span.style for span in text.spans if "bold" in str(span.style)]
    assert len(colours) == len(example.target_positions) > 2
    assert set(colours[::2]) == {"bold green"}
    assert set(colours[1::2]) == {"bold cyan"}
    assert styled(text, "yellow")[:3] == ["¹", "²", "³"]


def test_a_border_inside_a_character_is_shown_as_well_as_it_can_be(capitals_tokenizer, tokenize):
    example = tokenize("港")
    assert len(example.input_ids) == 3
    labels = [IGNORE_INDEX, *example.input_ids[1:]]
    split = TokenizedExample(example.input_ids, labels, example.origin)
    assert "\ufffd" in TokenView(capitals_tokenizer).tokens(split).plain


def test_a_blank_before_a_target_is_seen_where_a_tokenizer_drops_leading_blanks():
    """As Llama 2's does: its decoder strips the first blank of whatever it is given."""
    backend = Tokenizer(models.WordLevel({"▁Hello": 0, "▁world": 1, "<s>": 2}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    example = TokenizedExample([0, 1], [IGNORE_INDEX, 1], Origin(Path("a.txt"), 1))
    assert TokenView(tokenizer, coloured=False).tokens(example).plain == "Hello⟦ world⟧"


def test_data_cannot_rewrite_the_screen_or_hide_a_carriage_return(capitals_tokenizer, tokenize):
    example = tokenize("\x1b[2J \u202e [red]markup[/red]\r\nend")
    shown = TokenView(capitals_tokenizer).tokens(example).plain
    assert shown == "\\x1b[2J \\u202e [red]markup[/red]\\r↵\nend"


def test_a_headline_says_where_an_example_is_from_how_large_it_is_and_what_was_cut(
    capitals_tokenizer,
):
    ids = capitals_tokenizer("the capital", add_special_tokens=False)["input_ids"] * 20
    ids = ids[:20]
    example = TokenizedExample(ids, [IGNORE_INDEX] * 15 + ids[15:], Origin(Path("a/b.csv"), 1200))
    lines = TokenView(capitals_tokenizer, token_batch=2).example(example, 1234).plain.splitlines()
    headline = "── b.csv row 1,200 · 20 tokens, 5 targets (25 %) in 3 token batches of 2"
    assert lines[0] == headline
    assert lines[-1] == "✂ 1,234 tokens cut off"


def test_a_packed_row_says_how_full_it_is(capitals_tokenizer, tokenize):
    examples = [tokenize("Aru?", "Belo", row=3), tokenize("Coria?", "Dane", row=9)]
    num_tokens = sum(len(example.input_ids) for example in examples)
    headline = TokenView(capitals_tokenizer).packed_row(2, examples, 64).plain
    assert headline.startswith(f"━━ packed row 2 · 2 examples, {num_tokens} tokens, ")
    assert headline.endswith("), room for 64")


def test_the_legend_explains_exactly_what_is_seen(capitals_tokenizer):
    plain = TokenView(capitals_tokenizer).legend().plain
    assert "token batch" not in plain
    assert "⟦" not in plain
    assert "¹ token batch" in TokenView(capitals_tokenizer, token_batch=4).legend().plain
