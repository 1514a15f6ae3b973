"""Thinking is handed to a template under the key that it reads, and is learned exactly."""

from pathlib import Path

import pytest

from tests.data.conftest import decoded_targets, tokenizer_of
from yrunner.data.chat.template import ThinkingKeys, find_thinking_keys
from yrunner.data.chat.tokenize import prompt_text, tokenize_conversations
from yrunner.data.conversation import Conversation, FaultyRow
from yrunner.data.formats.turns import read_turns
from yrunner.errors import Origin
from yrunner.models.scratch import train_tokenizer

THOUGHT = " I add 0 and 0.\n\nTwice."
INLINE = f"<think>\n{THOUGHT}\n</think>\n\nIt is 0."
QUESTION = {"role": "user", "content": "0+0?"}
CALL = {"id": "call00001", "function": {"name": "tide_table", "arguments": {"day": 3}}}
RESULT = {"role": "tool", "content": '"r"', "name": "tide_table", "tool_call_id": "call00001"}
CHANNELS = f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final"
LEARNED = {
    "gpt_oss": f"{CHANNELS}<|message|>It is 0.<|return|>",
    "gemma4": f"<|channel>thought\n{THOUGHT}\n<channel|>It is 0.<turn|>",
    "header_marked": f" think<|message|>{THOUGHT}<|end|><|start|>assistant say<|message|>It is 0."
    "<|return|>",
    "qwen3": f"<think>\n{THOUGHT}\n</think>\n\nIt is 0.<|im_end|>",
    "chatml": f"<think>\n{THOUGHT}\n</think>\n\nIt is 0.<|im_end|>",
    "minimind": f"{THOUGHT}\n</think>\n\nIt is 0.<|im_end|>",
}


def reply(content="It is 0.", **others):
    return {"role": "assistant", "content": content, **others}


def tokenize(turns, tokenizer, tools=()):
    talk = Conversation(read_turns(turns, "messages"), Origin(Path("rows.jsonl"), 1), tools)
    (example,) = tokenize_conversations([talk], tokenizer)
    if isinstance(example, FaultyRow):
        raise example
    return decoded_targets(example, tokenizer)


def tokenizer_with(template):
    tokenizer = train_tokenizer(["ab"], 300)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("key", ["thinking", "reasoning", "reasoning_content", "thought"])
@pytest.mark.parametrize("template", LEARNED)
def test_thinking_of_any_key_is_learned_where_the_template_shows_it(template, key):
    turns = [QUESTION, reply(**{key: THOUGHT})]
    assert tokenize(turns, tokenizer_of(template)) == LEARNED[template]


@pytest.mark.parametrize("block", [INLINE, f"<think>{THOUGHT}</think>It is 0.", "\n" + INLINE])
@pytest.mark.parametrize("template", ["gpt_oss", "gemma4", "header_marked"])
def test_an_inline_block_is_handed_under_the_key(template, block):
    assert tokenize([QUESTION, reply(block)], tokenizer_of(template)) == LEARNED[template]


@pytest.mark.parametrize(
    ("shown", "keys"),
    [
        ("m.thinking", ThinkingKeys("thinking", "thinking")),
        ("m['reasoning']", ThinkingKeys("reasoning", "reasoning")),
        ("m.get('my_thoughts', '')", ThinkingKeys("my_thoughts", "my_thoughts")),
        ("m.thinking or m.reasoning_content", ThinkingKeys(*["reasoning_content"] * 2)),
        ("(m.reasoning if m.tool_calls else '')", ThinkingKeys("reasoning", "reasoning")),
        ("(m.tool_plan if m.tool_calls else m.thinking)", ThinkingKeys("thinking", "tool_plan")),
        ("('thinking' if thinking else '')", None),
        ("(m.thinking | length)", None),
        ("m.content.split('</think>')[-1]", None),
    ],
)
def test_a_template_is_asked_which_keys_it_shows(shown, keys):
    template = "{% for m in messages %}{{ " + shown + " }}{{ m.content }}<|im_end|>{% endfor %}"
    assert find_thinking_keys(tokenizer_with(template)) == keys


def test_thinking_of_earlier_turns_goes_under_the_key_too_and_may_be_omitted():
    turns = [QUESTION, reply("One.", thinking="Old."), QUESTION, reply(thinking=THOUGHT)]
    learned = tokenize(turns, tokenizer_of("gpt_oss"))
    assert learned == f"<|channel|>final<|message|>One.<|end|>{LEARNED['gpt_oss']}"


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (
            "gpt_oss",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.tide_table"
            '<|channel|>commentary json<|message|>{"day": 3}<|call|>',
        ),
        (
            "gemma4",
            '<|channel>thought\nHm.\n<channel|><|tool_call>call:tide_table{"day": 3}<tool_call|>'
            "<|tool_response>",
        ),
        (
            "tool_plan",
            '<|THINK|>Hm.<|/THINK|><|ACTION|>{"name": "tide_table", "arguments": {"day": 3}}'
            "<|/ACTION|><|END|>",
        ),
    ],
)
def test_thinking_before_a_call_and_the_calls_own_end_mark_are_learned(template, call):
    tokenizer = tokenizer_of(template)
    tools = ({"type": "function", "function": {"name": "tide_table", "description": "Tides."}},)
    turns = [QUESTION, reply("", thinking="Hm.", tool_calls=[CALL]), RESULT, reply("At three.")]
    end = {"gpt_oss": "<|return|>", "gemma4": "<turn|>", "tool_plan": "<|END|>"}[template]
    before = "<|channel|>final<|message|>" if template == "gpt_oss" else ""
    assert tokenize(turns, tokenizer, tools) == f"{call}{before}At three.{end}"
    plain = [turn | {"thinking": None} if "thinking" in turn else turn for turn in turns]
    assert "Hm." not in tokenize(plain, tokenizer, tools)


def test_thinking_that_a_template_reads_but_does_not_show_refuses_the_row():
    with pytest.raises(FaultyRow, match="omits the thinking of the last reply"):
        tokenize([QUESTION, reply(thinking=THOUGHT)], tokenizer_of("tool_plan"))


@pytest.mark.parametrize("content", ["The tag <think> opens it.", "<think>", "</think> ends it."])
def test_a_reply_about_the_tags_stays_as_it_is(content):
    learned = tokenize([QUESTION, reply(content)], tokenizer_of("gpt_oss"))
    assert learned == f"<|channel|>final<|message|>{content}<|return|>"


@pytest.mark.parametrize("thought", ["It is 0.", "<|end|>", "<|channel|>final<|message|>", "[[1]]"])
def test_thinking_may_hold_what_the_template_writes_and_the_reply_itself(thought):
    learned = tokenize([QUESTION, reply(thinking=thought)], tokenizer_of("gpt_oss"))
    assert learned == LEARNED["gpt_oss"].replace(THOUGHT, thought)


def test_a_prompt_has_earlier_thinking_where_the_template_puts_it():
    turns = read_turns([QUESTION, reply(thinking=THOUGHT), QUESTION], "messages")
    prompt = prompt_text(turns, tokenizer_of("header_marked"))
    assert f"<|start|>assistant think<|message|>{THOUGHT}<|end|>" in prompt
    assert "<think>" not in prompt
