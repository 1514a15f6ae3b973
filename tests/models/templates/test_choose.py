"""Known chat templates write what the originals write; arguments become part of a template."""

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from yrunner.data.chat.template import as_chat, read_turn_marks
from yrunner.data.chat.tokenize import prompt_of, tokenize_conversations
from yrunner.data.conversation import Conversation, Message
from yrunner.errors import ModelError, Origin
from yrunner.models.load import find_stop_ids, load_tokenizer
from yrunner.models.scratch import train_tokenizer
from yrunner.models.templates.choose import (
    MARKS,
    arguments_read_by,
    choose_template,
    known_template,
    set_known_template,
    set_template_args,
    split_marks,
)
from yrunner.recipe.schema.model import KNOWN_TEMPLATES
from yrunner.tokens import IGNORE_INDEX

BOS = {"llama3": "<|begin_of_text|>", "deepseek": "<｜begin▁of▁sentence｜>"}
EOS = {"deepseek": "<｜end▁of▁sentence｜>", "mistral": "</s>", "glm4": "<|endoftext|>"}
SYSTEM = Message("system", "Be brief.")
TALK = [Message("user", "Hi?"), Message("assistant", "Hello."), Message("user", "Who?")]
REPLY = Message("assistant", "Me.")

EXPECTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
    "<|im_start|>assistant\n[Hello.<|im_end|>]\n<|im_start|>user\nWho?<|im_end|>\n"
    "<|im_start|>assistant\n[Me.<|im_end|>]\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[Hello.<|eot_id|>]"
    "<|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[Me.<|eot_id|>]",
    "qwen3": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
    "<|im_start|>assistant\n[Hello.<|im_end|>]\n<|im_start|>user\nWho?<|im_end|>\n"
    "<|im_start|>assistant\n[<think>\n\n</think>\n\nMe.<|im_end|>]\n",
    "gemma": "<bos><start_of_turn>user\nBe brief.\n\nHi?<end_of_turn>\n"
    "<start_of_turn>model\n[Hello.<end_of_turn>]\n<start_of_turn>user\nWho?<end_of_turn>\n"
    "<start_of_turn>model\n[Me.<end_of_turn>]\n",
    "mistral": "<bos>[INST] Be brief.\n\nHi?[/INST][ Hello.</s>][INST] Who?[/INST][ Me.</s>]",
    "deepseek": "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi?<｜Assistant｜>"
    "[Hello.<｜end▁of▁sentence｜>]<｜User｜>Who?<｜Assistant｜>[Me.<｜end▁of▁sentence｜>]",
    "glm4": "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi?<|assistant|>\n[Hello.<|user|>]\nWho?"
    "<|assistant|>\n[Me.<|endoftext|>]",
    "phi4": "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi?<|im_end|>"
    "<|im_start|>assistant<|im_sep|>[Hello.<|im_end|>]<|im_start|>user<|im_sep|>Who?<|im_end|>"
    "<|im_start|>assistant<|im_sep|>[Me.<|im_end|>]",
}
"""The whole conversation as the model cards of the families show it, with targets in brackets."""


def tokenizer_for(name: str) -> Any:
    """A tokenizer with the control tokens of a family and a known template."""
    tokenizer: Any = train_tokenizer(["Hello, who is it? Be brief. system user model"] * 4, 400)
    marks = MARKS[name]
    bos, eos = BOS.get(name, "<bos>"), EOS.get(name, (*marks.needed, "")[-1])
    special = [*marks.needed, bos, eos, *(() if name == "qwen3" else marks.may_be_split)]
    tokenizer.add_tokens([AddedToken(text, special=True) for text in special], special_tokens=True)
    tokenizer.add_tokens(list(marks.may_be_split))
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    tokenizer.chat_template = None
    choose_template(tokenizer, name)
    return tokenizer


def ids_and_targets(messages: list[Message], tokenizer: Any) -> tuple[list[int], list[int]]:
    (row,) = tokenize_conversations(
        [Conversation(tuple(messages), Origin(Path("a"), 1))], tokenizer
    )
    return row.input_ids, [label != IGNORE_INDEX for label in row.labels]


def bracketed(ids: list[int], targets: list[int], tokenizer: Any) -> str:
    """The text of the tokens, with brackets around the targets."""
    text = ""
    for place, token in enumerate(ids):
        before = place > 0 and targets[place - 1]
        text += "[" * (targets[place] and not before) + "]" * (before and not targets[place])
        text += tokenizer.decode([token])
    return text + "]" * targets[-1]


@pytest.mark.parametrize("name", KNOWN_TEMPLATES)
def test_a_known_template_writes_the_structure_of_its_family(name):
    tokenizer = tokenizer_for(name)
    ids, targets = ids_and_targets([SYSTEM, *TALK, REPLY], tokenizer)
    assert bracketed(ids, targets, tokenizer) == EXPECTED[name]
    # Token by token: every control token is one id.
    assert set(MARKS[name].needed) - {"<|system|>"} <= set(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("name", KNOWN_TEMPLATES)
def test_the_prompt_of_a_known_template_is_what_comes_before_the_reply(name):
    tokenizer = tokenizer_for(name)
    ids, targets = ids_and_targets([SYSTEM, *TALK, REPLY], tokenizer)
    prompt = tokenizer(prompt_of([SYSTEM, *TALK], tokenizer), add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert not targets[len(prompt) - 1] and all(targets[len(prompt) :][:2])
    ends = set(tokenizer.convert_ids_to_tokens(find_stop_ids(tokenizer)))
    assert ends >= {{"glm4": "<|user|>"}.get(name, read_turn_marks(tokenizer).ends[0])}


@pytest.mark.parametrize("name", ["llama3", "gemma", "deepseek", "glm4", "phi4"])
def test_a_base_without_the_control_tokens_is_refused_with_what_would_fit(name):
    tokenizer = train_tokenizer(["Hello"] * 4, 300)  # it has ChatML's
    with pytest.raises(ModelError, match=rf"chat_template {name} needs .*Use chatml or qwen3"):
        set_known_template(tokenizer, name)
    bare = copy.deepcopy(tokenizer_for("mistral"))
    with pytest.raises(ModelError, match=r"needs .*Write a \.jinja file|needs .*[Uu]se chatml"):
        set_known_template(bare, name)


def test_marks_that_a_family_writes_as_plain_text_may_be_split_and_are_named():
    tokenizer = train_tokenizer(["Hello"] * 4, 300)
    set_known_template(tokenizer, "mistral")
    assert split_marks(tokenizer, "mistral") == ["[INST]", "[/INST]"]
    assert split_marks(tokenizer_for("mistral"), "mistral") == []
    assert split_marks(tokenizer, "qwen3") == ["<think>", "</think>"]
    assert split_marks(tokenizer, Path("own.jinja")) == split_marks(tokenizer, None) == []


@pytest.mark.parametrize("name", ["gemma", "mistral", "llama3", "chatml", "phi4", "glm4"])
def test_an_unknown_role_is_refused_by_name(name):
    with pytest.raises(ModelError, match="role 'critic' is unknown"):
        prompt_of([Message("user", "a"), Message("critic", "b")], tokenizer_for(name))


def test_every_known_template_is_a_file_with_its_marks():
    assert set(MARKS) == set(KNOWN_TEMPLATES) == set(EXPECTED)
    for name in KNOWN_TEMPLATES:
        reads = {"qwen3": {"enable_thinking"}}.get(name, set())
        assert arguments_read_by(known_template(name), tokenizer_for(name)) == reads


# Arguments

QUESTION = [{"role": "user", "content": "Hi?"}]


@pytest.fixture
def qwen3() -> Any:
    return tokenizer_for("qwen3")


def rendered(tokenizer: Any, **arguments: Any) -> str:
    return str(
        tokenizer.apply_chat_template(
            QUESTION, tokenize=False, add_generation_prompt=True, **arguments
        )
    )


def test_an_argument_becomes_the_default_and_a_caller_may_still_pass_another(qwen3):
    thinking, plain = rendered(qwen3, enable_thinking=True), rendered(qwen3, enable_thinking=False)
    assert plain == thinking + "<think>\n\n</think>\n\n"
    set_template_args(qwen3, {"enable_thinking": False})
    assert rendered(qwen3) == plain
    assert rendered(qwen3, enable_thinking=True) == thinking
    set_template_args(qwen3, {"enable_thinking": True})
    assert rendered(qwen3) == thinking, "the recipe that is applied last decides"


@pytest.mark.parametrize(
    "value",
    [
        *(True, False, None, 3, -2.5, 1e-5, "", "灯塔 🦀"),
        "a'b\"c\\n\n%}{{ x }}{#",
        [1, ["a"]],
        {"k": {"l": []}},
    ],
)
@pytest.mark.parametrize("start", ["", "\n", "\n\n  ", "{#- note -#}\n"])
def test_any_value_reaches_the_template_as_it_was_passed(value, start, qwen3):
    template = start + "{{ effort is none }}{{ effort | tojson }}{{ messages[0].content }}"
    qwen3.chat_template = template
    passed = rendered(qwen3, effort=value)
    set_template_args(qwen3, {"effort": value})
    assert rendered(qwen3) == passed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"enable_thinkin": False}, r'never reads "enable_thinkin"; it reads enable_thinking\. '
         r'Did you mean "enable_thinking"\?'),
        ({"reasoning_effort": "low"}, r'never reads "reasoning_effort"; it reads enable_thinking'),
        ({"messages": []}, "messages comes from the rows"),
        ({"state": 1}, 'never reads "state"'),
        ({"eos_token": "x"}, 'never reads "eos_token"'),
    ],
)  # fmt: skip
def test_an_argument_that_the_template_never_reads_is_refused_with_what_it_reads(
    arguments, said, qwen3
):
    with pytest.raises(ModelError, match=said):
        set_template_args(qwen3, arguments)
    before = qwen3.chat_template
    set_template_args(qwen3, arguments, strict=False)
    assert qwen3.chat_template == before


def test_a_tokenizer_without_a_template_has_no_arguments(qwen3):
    qwen3.chat_template = None
    with pytest.raises(ModelError, match="needs a chat template"):
        choose_template(qwen3, None, {"enable_thinking": False})
    choose_template(qwen3, "qwen3", {"enable_thinking": False})
    assert rendered(qwen3).endswith("</think>\n\n")


ASKED = "{% if not style is defined %}{% set style = 'plain' %}{% endif %}{{ style }}"
SET = "{% if messages[0].role == 'user' %}{% set seen = 1 %}{% endif %}{{ seen }}"
MACRO = "{% macro show(m) %}{{ m.content }}{{ date }}{% endmacro %}{{ show(messages[0]) }}"
LOOP = "{% for t in tools %}{{ t | tojson }}{{ loop.first }}{% break %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reads"),
    [
        (ASKED, {"style"}),
        (SET, set()),
        ("{% set effort = effort | default('low') %}{{ effort }}", {"effort"}),
        (MACRO, {"date"}),
        ("{% generation %}{{ mode }}{% endgeneration %}{{ bos_token }}{{ range(2) }}", {"mode"}),
        (LOOP, set()),
    ],
)
def test_the_arguments_of_a_template_are_found_in_its_source(template, reads, qwen3):
    assert arguments_read_by(template, qwen3) == reads


def test_each_of_several_templates_gets_the_arguments_that_it_reads(qwen3):
    qwen3.chat_template = {"default": known_template("qwen3"), "tool_use": "{{ messages }}"}
    set_template_args(qwen3, {"enable_thinking": False})
    assert qwen3.chat_template["tool_use"] == "{{ messages }}"
    assert rendered(qwen3).endswith("</think>\n\n")


def test_a_saved_tokenizer_records_its_arguments(qwen3, tmp_path):
    set_template_args(qwen3, {"enable_thinking": False})
    expected = rendered(qwen3)
    qwen3.save_pretrained(tmp_path)
    assert rendered(load_tokenizer(str(tmp_path))) == expected


# Thinking, from the mask to the prompt


@pytest.mark.parametrize("thinks", [True, False])
def test_masks_and_prompts_of_a_template_with_and_without_thinking_agree_token_by_token(
    thinks, qwen3
):
    set_template_args(qwen3, {"enable_thinking": thinks})
    before = as_chat(TALK, thinking_keys=read_turn_marks(qwen3).thinking_keys).for_template
    served = qwen3.apply_chat_template(before, add_generation_prompt=True)["input_ids"]
    asked = qwen3(prompt_of(TALK, qwen3), add_special_tokens=False)["input_ids"]
    ids, targets = ids_and_targets([*TALK, REPLY], qwen3)
    assert served == asked == ids[: len(asked)]
    reply = bracketed(ids[len(asked) :], targets[len(asked) :], qwen3)
    empty = "<think>\n\n</think>\n\n" if thinks else ""
    assert reply == f"[{empty}Me.<|im_end|>]\n"


def test_thinking_of_a_row_is_learned_where_the_prompt_leaves_it_to_the_model(qwen3):
    thought = Message("assistant", "<think>\nI add.\n</think>\n\nMe.")
    ids, targets = ids_and_targets([*TALK, thought], qwen3)
    text = bracketed(ids, targets, qwen3)
    assert text.endswith("assistant\n[<think>\nI add.\n</think>\n\nMe.<|im_end|>]\n")
