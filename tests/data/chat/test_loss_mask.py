"""Replies are found in whatever form the template shows them, or the row is refused."""

import pytest

from tests.data.conftest import conversation, tokenizer_of
from yrunner.data.chat.loss_mask import render_with_spans
from yrunner.data.chat.template import as_chat, read_turn_marks
from yrunner.data.conversation import FaultyRow
from yrunner.errors import ModelError
from yrunner.models.scratch import train_tokenizer

CHATML_TURN = "'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'"


def tokenizer_with(template):
    tokenizer = train_tokenizer(["ab"], 300)
    tokenizer.chat_template = template
    return tokenizer


def spanned(talk, tokenizer):
    text, spans = render_with_spans(as_chat(talk.messages), tokenizer, read_turn_marks(tokenizer))
    return [text[start:end] for start, end in spans]


def test_thinking_is_learned_in_the_last_turn_and_left_out_before():
    talk = conversation("q", "<think>\nold\n</think>\n\none", "q", "<think>\nnew\n</think>\n\ntwo")
    assert spanned(talk, tokenizer_of("qwen3")) == [
        "one<|im_end|>",
        "<think>\nnew\n</think>\n\ntwo<|im_end|>",
    ]


def test_an_empty_thinking_block_is_the_models_to_write_unless_the_prompt_holds_it():
    talk = conversation("q", "a")
    assert spanned(talk, tokenizer_of("qwen3")) == ["<think>\n\n</think>\n\na<|im_end|>"]
    in_the_prompt = tokenizer_of("qwen3").chat_template.replace(
        r"{{- '<|im_start|>assistant\n' -}}{%- endif -%}",
        r"{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' -}}{%- endif -%}",
    )
    assert spanned(talk, tokenizer_with(in_the_prompt)) == ["a<|im_end|>"]


def test_words_of_thinking_in_a_question_do_not_move_the_beginning_of_a_reply():
    talk = conversation("what is <think>?", "<think>\nhm\n</think>\n\na")
    shown = "{{ '<|im_start|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
    opened = "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    template = "{% for m in messages %}" + shown + "{% endfor %}" + opened
    assert spanned(talk, tokenizer_with(template)) == ["\n\na<|im_end|>"]


def test_generation_marks_that_hold_the_end_mark_are_taken_as_they_are():
    marked = "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    template = "{% for m in messages %}{% if m.role == 'assistant' %}" + marked
    template += "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    assert spanned(conversation("q", "a"), tokenizer_with(template)) == ["a<|im_end|>\n"]


@pytest.mark.parametrize("reply", ["a", "", "<|im_end|>"])
def test_generation_marks_without_the_end_mark_are_stretched_over_it(reply):
    assert spanned(conversation("q", reply), tokenizer_of("marked")) == [f"{reply}<|im_end|>"]


def test_a_second_generation_block_for_the_end_mark_belongs_to_its_reply():
    assert spanned(conversation("q", "a", "q", "b"), tokenizer_of("phi_marked")) == [
        "a<|end|>\n",
        "b<|end|>\n<|endoftext|>",
    ]


def marked(*pieces):
    """A template that writes these pieces of a reply in blocks of their own, with `/` between."""
    blocks = "/".join("{% generation %}" + piece + "{% endgeneration %}" for piece in pieces)
    question = "<|im_start|>user{{ m.content }}<|im_end|>\n"
    reply = "<|im_start|>assistant\n" + blocks
    turns = "{% for m in messages %}{% if m.role == 'user' %}" + question
    turns += "{% else %}" + reply + "{% endif %}{% endfor %}"
    return turns + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["{{ m.content }}", "<|im_end|>"], "{}/<|im_end|>"),
        (["so: ", "{{ m.content }}", "<|im_end|>"], "so: /{}/<|im_end|>"),
        (["{{ m.content }}<|im_end|>", ""], "{}<|im_end|>"),
    ],
)
def test_what_is_between_the_blocks_of_a_reply_is_the_models_to_write(pieces, expected):
    talk = conversation("q", "a", "q", "[[1]]", "a", "<|im_end|>")
    found = spanned(talk, tokenizer_with(marked(*pieces)))
    assert found == [expected.format(reply) for reply in ("a", "[[1]]", "<|im_end|>")]


@pytest.mark.parametrize(
    "header", ["<|im_start|>assistant\n", "assistant\n", "\n", "<|im_start|>assistant\n\n"]
)
@pytest.mark.parametrize("reply", ["a", "assistant\n", "\na", "<|im_start|>assistant\nb"])
def test_the_end_of_the_prompt_in_a_generation_block_is_not_learned(header, reply):
    opening = "<|im_start|>assistant\n"
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + '<|im_end|>\n' }}{% else %}"
        "{{ outside }}{% generation %}{{ inside + m.content + '<|im_end|>' }}{% endgeneration %}"
        "{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ opening }}{% endif %}"
    )
    names = {"outside": opening.removesuffix(header), "inside": header, "opening": opening}
    if not opening.endswith(header):
        names["outside"] = ""  # one line end more than in the prompt: the model's to write
    sets = "".join("{% set " + name + " = " + repr(text) + " %}" for name, text in names.items())
    more = "" if opening.endswith(header) else "\n"
    found = spanned(conversation("q", reply, "q", "b"), tokenizer_with(sets + template))
    assert found == [f"{more}{reply}<|im_end|>", f"{more}b<|im_end|>"]


def test_generation_marks_around_half_of_the_replies_are_refused():
    template = "{% for m in messages %}{% if loop.index == 2 %}{% generation %}{{ m.content }}"
    template += "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    tokenizer = tokenizer_with(template)
    with pytest.raises(FaultyRow, match="has 1 generation blocks for 2 replies"):
        spanned(conversation("q", "a", "q", "b"), tokenizer)


def test_a_template_without_an_end_mark_is_refused_with_the_remedy():
    with pytest.raises(ModelError) as refused:
        spanned(conversation("q", "a"), tokenizer_of("no_end_mark"))
    assert str(refused.value) == (
        "the chat template writes no end-of-turn token, so the model would never learn to stop. "
        "Set model.chat_template to a .jinja file that ends each turn with a special token"
    )


@pytest.mark.parametrize(
    "shown",
    [
        "m.content | upper",
        "m.content | replace('a', 'b')",
        "m.content | tojson",
        "m.content[:3]",
        "(m.content if loop.index0 == 1 else '')",
        "m.content + m.content",
    ],
)
def test_a_reply_that_the_template_changes_is_refused(shown):
    template = "{% for m in messages %}{{ '<|im_start|>' + " + shown + " + '<|im_end|>' }}"
    tokenizer = tokenizer_with(template + "{% endfor %}")
    with pytest.raises(FaultyRow, match="changes a reply beyond recognition"):
        spanned(conversation("why", 'a "lamp"', "why", "a lamp"), tokenizer)


def test_what_the_template_says_against_a_row_is_passed_on():
    with pytest.raises(FaultyRow, match="the chat template rejects it: System role not supported"):
        spanned(conversation("q", "a", system="s"), tokenizer_of("gemma"))
    broken = tokenizer_with("{% for m in messages %}{{ m.content + 1 }}{% endfor %}")
    with pytest.raises(FaultyRow, match="the chat template rejects it: can only concatenate"):
        spanned(conversation("q", "a"), broken)


def test_of_several_templates_the_default_is_taken():
    turns = "{% for m in messages %}{{ " + CHATML_TURN + " }}{% endfor %}"
    tokenizer = tokenizer_with({"default": turns, "tool_use": "{{ tools }}"})
    assert spanned(conversation("q", "a"), tokenizer)[0].endswith("a<|im_end|>")
    tokenizer.chat_template = {"tool_use": "{{ tools }}"}
    with pytest.raises(ModelError, match="has no chat template"):
        spanned(conversation("q", "a"), tokenizer)


def test_a_template_that_opens_no_reply_leaves_the_opening_to_the_model():
    tokenizer = tokenizer_with("{% for m in messages %}{{ " + CHATML_TURN + " }}{% endfor %}")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False)
    assert text == "<|im_start|>user\nq<|im_end|>\n"
    assert spanned(conversation("q", "a"), tokenizer) == ["<|im_start|>assistant\na<|im_end|>"]
