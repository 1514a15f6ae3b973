"""Ollama's template writes the chats that the tokenizer's own template writes."""

import re

import pytest
from transformers import GenerationConfig

from tests.data.conftest import TEMPLATES, tokenizer_of
from tests.models.templates.test_choose import tokenizer_for
from yrunner.models.export.ollama import modelfile, read_turns
from yrunner.models.gguf.tokenizer import begins_with_bos
from yrunner.models.templates.choose import set_template_args

CHATS = [
    [("user", "Who keeps it?")],
    [("system", "Be short."), ("user", "灯塔归谁管？")],
    [("user", "a"), ("assistant", "b\nc"), ("user", "d e"), ("assistant", "f"), ("user", "g")],
    [("system", "s"), ("user", "1"), ("assistant", "2"), ("user", "3")],
]


def as_ollama_renders(template, messages):
    """What Go makes of the few words of its template language that are used here."""
    pieces = re.split(r"\{\{ (.*?) \}\}", template)
    begin, end = 1, len(pieces) - 1 - pieces[::-1].index("end", 0)
    text = pieces[0]
    for index, message in enumerate(messages):
        shown = [True]
        taken = [False]
        for place in range(begin + 1, end):
            word = pieces[place]
            if place % 2 == 0:
                text += word if all(shown) else ""
            elif word == ".Content":
                text += message["content"] if all(shown) else ""
            elif word == "end":
                shown.pop(), taken.pop()
            else:
                if word.startswith("else "):
                    word = word.removeprefix("else ")
                    shown.pop()
                    before = taken.pop()
                else:
                    before = False
                holds = {
                    "if eq $i 0": index == 0,
                    'if ne .Role "system"': message["role"] != "system",
                }.get(word, word == f'if eq .Role "{message["role"]}"')
                shown.append(holds and not before)
                taken.append(holds or before)
    return text + pieces[-1]


def render(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token) if begins_with_bos(tokenizer) else text


@pytest.mark.parametrize("name", TEMPLATES)
def test_ollama_writes_the_same_chat(name):
    tokenizer = tokenizer_of(name)
    turns = read_turns(tokenizer)
    assert ("system" in turns.around) == (name not in ("gemma", "mistral"))
    template = turns.as_ollama()
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        if chat[0][0] not in turns.around:
            continue
        assert as_ollama_renders(template, messages) == render(tokenizer, messages)


@pytest.mark.parametrize("thinks", [True, False])
def test_ollama_writes_the_prompt_of_a_template_with_arguments(thinks):
    tokenizer = tokenizer_for("qwen3")
    set_template_args(tokenizer, {"enable_thinking": thinks})
    template = read_turns(tokenizer).as_ollama()
    assert template.endswith("</think>\n\n") != thinks
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        assert as_ollama_renders(template, messages) == render(tokenizer, messages)


def test_the_modelfile_has_all_that_ollama_needs():
    settings = GenerationConfig(temperature=0.6, top_p=0.9, do_sample=True)
    text, lack = modelfile("m.gguf", tokenizer_of("chatml"), settings, "Be short.")
    assert not lack
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """{{ range $i, $_ := .Messages }}')
    assert text.endswith(
        '<|im_start|>assistant\n"""\nSYSTEM """Be short."""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER temperature 0.6\nPARAMETER top_p 0.9\n'
    )


def test_a_template_that_hides_messages_is_not_imitated():
    tokenizer = tokenizer_of("chatml")
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ messages[-1]['content'] }}"
        assert read_turns(tokenizer) is None
        text, lack = modelfile("m.gguf", tokenizer, GenerationConfig(), None)
        assert "TEMPLATE" not in text
        assert lack.startswith("the chat template")
    finally:
        tokenizer.chat_template = before
