"""The quick way finds the same spans as the slow one, and asks the template once for each row."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import TEMPLATES, conversation, tokenizer_of
from yrunner.data.chat.loss_mask import SpanFinder, render_with_spans
from yrunner.data.chat.template import as_chat
from yrunner.data.conversation import FaultyRow

PIECES = [
    "a", "灯塔", "🦀", " ", "\n", "[[1]]", "<think>", "</think>", "<think>\n", "<|im_end|>",
    "<|im_start|>assistant\n", "</s>", "[/INST] ", "<|user|>", "<|assistant|>\n<think></think>",
]  # fmt: skip
contents = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=60)
@given(data=st.data())
def test_both_ways_find_the_same_spans(template, data):
    num_messages = 2 * data.draw(st.integers(1, 3))
    talk = conversation(*(data.draw(contents) for _ in range(num_messages)))
    tokenizer, chat = tokenizer_of(template), as_chat(talk.messages)
    finder = SpanFinder(tokenizer)
    assert render_and_find(finder, chat) == render_with_spans(chat, tokenizer, finder.marks)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("reply", [" lighthouse\n", "<think>\nhm\n</think>\n\nlighthouse", ""])
def test_the_number_of_renderings_does_not_grow_with_the_turns(template, reply, monkeypatch):
    num_renderings = []
    finder = SpanFinder(tokenizer_of(template))
    for num_turns in (3, 80):
        rendered = count_renderings(monkeypatch)
        render_and_find(finder, as_chat(conversation(*["q", reply] * num_turns).messages))
        num_renderings.append(len(rendered))
        assert sum(rendered) == len(rendered) * num_turns * 2, "each is of the whole talk"
    assert num_renderings[0] == num_renderings[1] <= 12


@pytest.mark.parametrize("template", TEMPLATES)
def test_of_rows_with_the_same_roles_only_the_first_is_rendered_twice(template, monkeypatch):
    finder = SpanFinder(tokenizer_of(template))
    render_and_find(finder, as_chat(conversation("q", "a", "q", "b").messages))
    rendered = count_renderings(monkeypatch)
    for number in range(10):
        reply = f"{number} lighthouses \n"
        render_and_find(finder, as_chat(conversation("q", reply, "why", reply).messages))
    assert len(rendered) == 10


def render_and_find(finder, chat):
    (text,) = finder.render_all([chat])
    return text, finder.find(text, chat)


def count_renderings(monkeypatch):
    """A list that gets the number of messages of every chat that a template renders from now on."""
    from yrunner.data.chat import template as chat_template

    rendered = []

    def render(*, conversations, **options):
        rendered.extend(map(len, conversations))
        return original(conversations=conversations, **options)

    monkeypatch.undo()
    original = chat_template.render_jinja_template
    monkeypatch.setattr(chat_template, "render_jinja_template", render)
    return rendered


def test_a_message_that_the_template_leaves_out_refuses_the_row():
    """Mistral Nemo's template shows the system message only where a question is the last turn."""
    tokenizer = tokenizer_of("chatml")
    shown = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    template = f"{{% for m in messages %}}{{% if m.role != 'system' %}}{shown}{{% endif %}}"
    before, tokenizer.chat_template = tokenizer.chat_template, template + "{% endfor %}"
    try:
        finder = SpanFinder(tokenizer)
        chat = as_chat(conversation("q", "a", system="Be kind.").messages)
        for _ in range(2):
            with pytest.raises(FaultyRow, match="omits a message with role system"):
                render_and_find(finder, chat)
    finally:
        tokenizer.chat_template = before
