"""A reply is learned as it is written, or the row is refused unless the recipe allows it."""

import json
from pathlib import Path

import pytest

from tests.data.conftest import TEMPLATES, decoded_targets, tokenizer_of
from yrunner.data.chat.reply_text import answer_behind_thinking
from yrunner.data.chat.tokenize import tokenize_conversations
from yrunner.data.conversation import Conversation, Message
from yrunner.data.dataset.cache import Cache
from yrunner.data.dataset.prepare import Rules, Source, prepare
from yrunner.errors import Origin, YRunnerError
from yrunner.models.scratch import train_tokenizer

THOUGHT = "<think>\nI add 2 and 2.\n</think>\n\nIt is 4."
REMOVED = "the chat template removes the thinking of the last reply"
CHANGED = "the chat template changes or removes text of the last reply"
NEVER_CLOSED = "the last reply opens a thinking block and never closes it"
NEVER_OPENED = "the last reply closes a thinking block that it never opened"
TWICE = "the last reply has thinking marks more than once"


def tokenizer_showing(shown, *, marked=False):
    """A ChatML tokenizer whose template writes `shown` for a reply."""
    reply = "{{ " + shown + " + '<|im_end|>' }}"
    if marked:
        reply = "{% generation %}" + reply + "{% endgeneration %}"
    tokenizer = train_tokenizer(["ab"], 300)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        + reply
        + "{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


@pytest.fixture
def prepare_rows(tmp_path):
    def prepare_them(tokenizer, *replies, **rules):
        """Prepare one row per reply; a list holds the turns of a talk."""
        rows = [
            {"messages": [{"role": "user", "content": f"2+2, {number}?"}, *turns]}
            for number, reply in enumerate(replies)
            for turns in [reply if isinstance(reply, list) else [answer(reply)]]
        ]
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        rules = Rules(max_length=1000, **rules)
        return prepare([Source((path,))], tokenizer, rules, Cache(tmp_path / "cache"))

    return prepare_them


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def refused(prepared):
    return {row.origin.row: row.reason for row in prepared.reports[0].refusals}


@pytest.mark.parametrize("marked", [False, True], ids=["found", "marked"])
@pytest.mark.parametrize(
    ("shown", "reply", "reason"),
    [
        ("m.content.split('</think>')[-1]", THOUGHT, REMOVED),
        ("m.content.split('</think>')[-1]", "It ends with </think>, always.", CHANGED),
        ("m.content.split('</think>')[-1]", "It ends with `</think>`.", CHANGED),
        ("m.content.split('</reasoning>')[-1]", "<reasoning>I add.</reasoning>It is 4.", REMOVED),
        ("m.content.split('[/THINK]')[-1] | trim", "[THINK]I add.[/THINK]It is 4.", REMOVED),
        ("m.content.split('◁/think▷')[-1]", "◁think▷I add.◁/think▷It is 4.", REMOVED),
        ("m.content | replace('<think>', '') | replace('</think>', '')", THOUGHT, CHANGED),
        ("m.content | replace('4', '5')", "It is 4.", CHANGED),
        ("m.content | lower", "It IS 4.", CHANGED),
        ("m.content[:6]", "It is 4, as always.", CHANGED),
        ("m.content.removeprefix('Answer: ')", "Answer: 4", CHANGED),
        ("m.content.split('###')[0]", "It is 4. ### Notes", CHANGED),
    ],
)
def test_a_template_that_alters_the_last_reply_refuses_the_row(
    shown, reply, reason, marked, prepare_rows
):
    tokenizer = tokenizer_showing(shown, marked=marked)
    assert refused(prepare_rows(tokenizer, "yes", reply)) == {2: reason}


@pytest.mark.parametrize("marked", [False, True], ids=["found", "marked"])
@pytest.mark.parametrize("targets", ["assistant", "last_assistant", "all"])
def test_allowed_rows_are_trained_on_and_counted(targets, marked, prepare_rows):
    tokenizer = tokenizer_showing("m.content.split('</think>')[-1]", marked=marked)
    rules = {"targets": targets, "altered": "allow"}
    prepared = prepare_rows(tokenizer, "It is 4.", THOUGHT, "<think>\nI add", **rules)
    prepared.check(too_long="refuse", invalid="refuse", altered="allow")
    assert "\nIt is 4.<|im_end|>" in decoded_targets(prepared.train[1], tokenizer)
    assert "I add 2" not in tokenizer.decode(prepared.train[1].input_ids)
    assert [(it.what, it.count, it.places[0].row, it.remedy) for it in prepared.findings] == [
        (
            "replies whose text the chat template changes or removes in train",
            1,
            2,
            "set model.chat_template to one that keeps the text",
        ),
        ("replies with unbalanced thinking marks in train", 1, 3, "fix the thinking marks"),
    ]
    assert set(refused(prepare_rows(tokenizer, "It is 4.", THOUGHT, targets=targets))) == {2}


def test_the_refusal_names_the_rows_and_the_ways_out(prepare_rows):
    tokenizer = tokenizer_of("deepseek")
    prepared = prepare_rows(tokenizer, *[THOUGHT.replace("2", str(n)) for n in range(8)])
    with pytest.raises(YRunnerError) as error:
        prepared.check(too_long="refuse", invalid="drop")
    message = str(error.value)
    assert f"a.jsonl row 1: {REMOVED} (and 7 rows like it)" in message
    assert "8 rows cannot be used (changed by the chat template: 8)" in message
    assert "Set model.chat_template to one that keeps the text" in message
    assert "reasoning_content" in message
    assert "data.altered: drop" in message and "data.altered: allow" in message


def test_dropped_rows_are_counted(prepare_rows):
    prepared = prepare_rows(tokenizer_of("deepseek"), "yes", THOUGHT, altered="drop")
    prepared.check(too_long="refuse", invalid="refuse", altered="drop")
    assert (len(prepared.train), prepared.reports[0].refused_by_kind) == (1, {"altered": 1})


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "deepseek"])
def test_templates_that_only_move_or_trim_text_pass(template, prepare_rows):
    replies = [
        "It is 4.", "  It is 4.\n", THOUGHT, "<think>I add.</think>It is 4.", "[[1]] < 2",
        "<think>\n\n</think>\n\nIt is 4.", "<reasoning>\nI add.\n</reasoning>\nIt is 4.",
        "```\n<think>\n```", "Write \"<think>\".",
    ]  # fmt: skip
    earlier = [answer(THOUGHT), {"role": "user", "content": "and?"}, answer(THOUGHT)]
    prepared = prepare_rows(tokenizer_of(template), *replies, earlier)
    assert refused(prepared) == {}
    assert prepared.findings == []


@pytest.mark.parametrize("shown", ["m.content", "m.content | trim"])
@pytest.mark.parametrize("marked", [False, True], ids=["found", "marked"])
@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("<think>\nI add", NEVER_CLOSED),
        ("It is 4.\n<think>\nI add", NEVER_CLOSED),
        ("[THINK]I add", NEVER_CLOSED),
        ("I add.\n</think>\n\nIt is 4.", NEVER_OPENED),
        ("I add.</think>It is 4.", NEVER_OPENED),
        ("<think>a</think>b<think>c</think>d", TWICE),
        ("<think><think>a</think>b", TWICE),
        ("<think>a</think></think>b", TWICE),
        ("The mark is </think>, they say.", None),
        ("Open with `<think>`.", None),
    ],
)
def test_unbalanced_thinking_refuses_the_row_and_a_mention_does_not(
    shown, marked, reply, reason, prepare_rows
):
    prepared = prepare_rows(tokenizer_showing(shown, marked=marked), "yes", reply)
    assert refused(prepared) == ({2: reason} if reason else {})


def test_a_mention_that_a_template_takes_for_thinking_refuses_the_row(prepare_rows):
    reply = "The mark is </think>, they say."
    for template in ("qwen3", "thinking_only", "minimind", "glm"):
        assert refused(prepare_rows(tokenizer_of(template), reply)) == {1: CHANGED}


def test_thinking_that_the_prompt_opens_need_not_be_opened_again(prepare_rows):
    reply = "I add.\n</think>\n\nIt is 4."
    assert refused(prepare_rows(tokenizer_of("thinking_only"), reply)) == {}
    assert refused(prepare_rows(tokenizer_of("qwen3"), reply)) == {1: NEVER_OPENED}


def test_the_last_learned_reply_decides_even_if_others_follow(prepare_rows):
    turns = [answer(THOUGHT), {"role": "user", "content": "and?"}, answer("a")]
    tokenizer = tokenizer_of("qwen3")
    assert refused(prepare_rows(tokenizer, turns)) == {}
    turns[-1]["train"] = False
    assert refused(prepare_rows(tokenizer, turns)) == {1: REMOVED}


def test_an_earlier_reply_may_lose_its_thinking_but_nothing_else(prepare_rows):
    question = {"role": "user", "content": "and?"}
    tokenizer = tokenizer_of("deepseek")
    kept = [answer(THOUGHT), question, answer("a")]
    cut = [answer("Between A</think> and B"), question, answer("a")]
    unbalanced = [answer("<think>\nI add"), question, answer("a")]
    prepared = prepare_rows(tokenizer_showing("m.content"), kept, unbalanced)
    assert refused(prepared) == {}
    assert [(it.what, it.count) for it in prepared.findings] == [
        ("replies with unbalanced thinking marks in train", 1)
    ]
    other = tokenizer_showing("m.content | replace('B', 'b')")
    assert refused(prepare_rows(tokenizer, kept)) == {}
    assert refused(prepare_rows(other, kept, cut)) == {
        2: "the chat template changes or removes text of an earlier reply"
    }


def test_a_result_without_rules_is_tokenized_as_before():
    messages = (Message("user", "q"), Message("assistant", THOUGHT))
    tokenizer = tokenizer_showing("m.content.split('</think>')[-1]")
    (example,) = tokenize_conversations([Conversation(messages, Origin(Path("a"), 1))], tokenizer)
    assert decoded_targets(example, tokenizer) == "\n\nIt is 4.<|im_end|>"


@pytest.mark.parametrize(
    ("written", "behind"),
    [
        ("It is 4.", "It is 4."),
        ("<think>\n2 + 2\n</think>\n\nIt is 4.", "It is 4."),
        ("<think>\n\n</think>\n\nIt is 4.", "It is 4."),
        ("2 + 2 is 4, so\n</think>\nIt is 4.", "It is 4."),
        ("[THINK]2 + 2[/THINK]It is 4.", "It is 4."),
        ("<reasoning>a</reasoning>It is 4.", "It is 4."),
        ("<|begin_of_thought|>a<|end_of_thought|> It is 4.", "It is 4."),
        ("<think>a</think>A `<think>` and a `</think>`.", "A `<think>` and a `</think>`."),
        ("Use the <think> tag for that.", "Use the <think> tag for that."),
        ("<think>a</think>", ""),
        ("", ""),
        ("<think>\nOkay, 4? It is 4. Let me see", None),
        ("<think>a</think>\n<think>b", None),
        ("[THINK]It is 4.", None),
    ],
)
def test_the_answer_is_what_comes_behind_the_thinking(written, behind):
    assert answer_behind_thinking(written) == behind


def test_behind_a_prompt_that_opens_the_thinking_nothing_is_an_answer_before_its_end():
    assert answer_behind_thinking("2 + 2 is 4.", opened=True) is None
    assert answer_behind_thinking("2 + 2\n</think>\n\nIt is 4.", opened=True) == "It is 4."
