"""Calls of tools are learned where the template shows them, and the row is refused where not."""

import copy
import json
from pathlib import Path

import pytest

from tests.data.conftest import decoded_targets, tokenizer_of
from yrunner.data.chat.tokenize import tokenize_conversations
from yrunner.data.conversation import Conversation, FaultyRow, Message
from yrunner.errors import Origin
from yrunner.tokens import IGNORE_INDEX

ARGUMENTS = {"place": "雾港 <|im_end|>", "day": 3}
OBJECT = json.dumps(ARGUMENTS, ensure_ascii=False)
TOOL = {
    "type": "function",
    "function": {"name": "tide_table", "description": "Tides.", "parameters": {"type": "object"}},
}
IN_XML = f'<tool_call>\n{{"name": "tide_table", "arguments": {OBJECT}}}\n</tool_call><|im_end|>'
SHOWN = {
    "qwen25": [IN_XML, "At three.<|im_end|>", "Not at all.<|im_end|>"],
    "minimind": [IN_XML, "At three.<|im_end|>", "Not at all.<|im_end|>"],
    "llama3": [
        f'{{"name": "tide_table", "parameters": {OBJECT}}}<|eot_id|>',
        "At three.<|eot_id|>",
        "Not at all.<|eot_id|>",
    ],
    "mistral": [
        f'[TOOL_CALLS][{{"name": "tide_table", "arguments": {OBJECT}, "id": "call00001"}}]</s>',
        " At three.</s>",
        " Not at all.</s>",
    ],
    "glm": [
        "\n<think></think>\n<tool_call>tide_table\n<arg_key>place</arg_key>\n"
        "<arg_value>雾港 <|im_end|></arg_value>\n<arg_key>day</arg_key>\n<arg_value>3</arg_value>\n"
        "</tool_call><|observation|>",
        "\n<think></think>\nAt three.<|user|>",
        "\n<think></think>\nNot at all.<|endoftext|>",
    ],
}
"""What the model has to write in a talk with one call."""


def call(number=1):
    function = {"name": "tide_table", "arguments": ARGUMENTS}
    return {"id": f"call0000{number}", "type": "function", "function": function}


def result(content, number=1):
    extras = {"name": "tide_table", "tool_call_id": f"call0000{number}"}
    return Message("tool", content, extras=extras)


def talk_of(*messages, tools=()):
    return Conversation(messages, Origin(Path("calls.jsonl"), 1), tools)


def talk_with(*calls, content="", tools=(TOOL,)):
    return talk_of(
        Message("user", "When is high tide?"),
        Message("assistant", content, tool_calls=calls),
        *(result(f'"{hour} o\'clock"', hour) for hour in range(1, len(calls) + 1)),
        Message("assistant", "At three."),
        Message("user", "Thanks"),
        Message("assistant", "Not at all."),
        tools=tools,
    )


def tokenize(talk, template):
    (example,) = tokenize_conversations([talk], tokenizer_of(template))
    if isinstance(example, FaultyRow):
        raise example
    return example


@pytest.mark.parametrize("template", SHOWN)
def test_a_call_is_learned_with_its_end_mark_and_the_result_is_not(template):
    example = tokenize(talk_with(call()), template)
    assert decoded_targets(example, tokenizer_of(template)) == "".join(SHOWN[template])


def test_a_template_that_wants_the_arguments_as_text_gets_them_so():
    talk = talk_with(call(), tools=())
    assert decoded_targets(tokenize(talk, "deepseek"), tokenizer_of("deepseek")) == (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>tide_table\n```json\n"
        f"{OBJECT}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
        "At three.<｜end▁of▁sentence｜>Not at all.<｜end▁of▁sentence｜>"
    )


@pytest.mark.parametrize("template", ["qwen25", "minimind", "glm", "mistral"])
def test_several_calls_of_one_turn_are_learned_together(template):
    targets = decoded_targets(
        tokenize(talk_with(call(1), call(2)), template), tokenizer_of(template)
    )
    assert targets.count("tide_table") == 2
    assert "o'clock" not in targets


@pytest.mark.parametrize("template", ["qwen25", "minimind", "glm"])
def test_words_before_a_call_are_learned_with_it(template):
    example = tokenize(talk_with(call(), content="I look it up."), template)
    assert "I look it up.\n<tool_call>" in decoded_targets(example, tokenizer_of(template))


@pytest.mark.parametrize("content", ["", " ", "<|im_end|>\n", "<think>\nso\n</think>\n\n"])
@pytest.mark.parametrize("template", ["qwen25", "minimind"])
def test_a_call_as_the_last_turn_ends_the_row(template, content):
    talk = talk_of(Message("user", "q"), Message("assistant", content, tool_calls=(call(),)))
    targets = decoded_targets(tokenize(talk, template), tokenizer_of(template))
    assert targets.endswith(IN_XML)


@pytest.mark.parametrize("template", SHOWN)
def test_the_tokens_before_an_answer_to_a_result_are_those_at_inference(template, monkeypatch):
    monkeypatch.setitem(ARGUMENTS, "place", "雾港")
    talk, tokenizer = talk_with(call()), tokenizer_of(template)
    example = tokenize(talk, template)
    messages = [
        {"role": it.role, "content": it.content, **(it.extras or {})}
        | ({"tool_calls": list(it.tool_calls)} if it.tool_calls else {})
        for it in talk.messages
    ]
    for turn in (1, 3, 5):
        prompt = tokenizer.apply_chat_template(
            messages[:turn], tools=[TOOL], add_generation_prompt=True, return_dict=False
        )
        assert example.input_ids[: len(prompt)] == prompt
        assert example.labels[len(prompt) - 1] == IGNORE_INDEX != example.labels[len(prompt)]


def test_a_template_of_its_own_for_tools_is_taken_for_rows_with_tools_only():
    tokenizer = copy.deepcopy(tokenizer_of("chatml"))
    own = {"default": tokenizer.chat_template, "tool_use": tokenizer_of("qwen25").chat_template}
    tokenizer.chat_template = own
    plain = talk_of(Message("user", "q"), Message("assistant", "a"))
    with_tools, without = tokenize_conversations([talk_with(call()), plain], tokenizer)
    assert decoded_targets(with_tools, tokenizer) == "".join(SHOWN["qwen25"])
    assert tokenizer.decode(without.input_ids).startswith("<|im_start|>user")


@pytest.mark.parametrize(
    ("talk", "template", "reason"),
    [
        (talk_with(call(), tools=()), "chatml", "does not render tool_calls"),
        (talk_with(call()), "chatml", "does not render tools"),
        (talk_with(call(), content="So."), "llama3", "changes a reply beyond recognition"),
        (talk_with(call(1), call(2)), "llama3", "rejects it: one call at a time"),
        (
            talk_of(Message("user", "q"), result("r"), Message("assistant", "a")),
            "phi",
            "omits a message with role tool",
        ),
    ],
    ids=["calls", "tools", "words before a call", "two calls", "results"],
)
def test_what_the_template_does_not_show_refuses_the_row(talk, template, reason):
    with pytest.raises(FaultyRow, match=f"the chat template {reason}") as fault:
        tokenize(talk, template)
    assert fault.value.kind == "template"


def test_words_before_a_call_that_a_generation_block_omits_refuse_the_row():
    tokenizer = copy.deepcopy(tokenizer_of("qwen3_marked"))
    shown = "message.content.lstrip('\\n')"
    assert shown in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(
        shown, f"({shown} if not message.tool_calls else '')"
    )
    silent, talking = tokenize_conversations(
        [talk_with(call()), talk_with(call(), content="I look it up.")], tokenizer
    )
    assert decoded_targets(silent, tokenizer).count("tide_table") == 1
    assert str(talking) == "the chat template changes a reply beyond recognition"
