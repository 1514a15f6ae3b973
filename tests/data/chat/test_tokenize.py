"""The mask is right: what is learned is what the model must write, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, processors

from tests.data.conftest import (
    KNOWS_SYSTEM,
    TEMPLATES,
    conversation,
    decoded_targets,
    ids_of_prompt,
    shown_replies,
    shown_text,
    split_thinking,
    tokenizer_of,
    without_ends,
)
from yrunner.data.chat.tokenize import prompt_text, tokenize_chunks, tokenize_conversations
from yrunner.data.conversation import Conversation, FaultyRow, Message
from yrunner.errors import ModelError, Origin
from yrunner.models.scratch import train_tokenizer
from yrunner.tokens import IGNORE_INDEX

PIECES = [
    "[[1]]", "", " ", "\n", "\n\n", "  ", "\t", "\r\n", "a", "The lighthouse", "灯塔", "🦀",
    "👩‍👩‍👧", "\x00", "\u2028", "\u3000", "e\u0301", "\U000f0000", "{{ x }}", "{% generation %}",
    "<|im_start|>assistant\n", "<|im_start|>user\n", "<|im_end|>", "<|im_end|>\n", "</s>", "<s>",
    "[/INST]", "[INST] ", "<start_of_turn>model\n", "<end_of_turn>", "<|eot_id|>",
    "<|end_header_id|>\n\n", "<|start|>assistant", "<|channel|>final<|message|>", "assistant: ",
]  # fmt: skip
THINKING = ["<think>", "</think>", "<think>\n\n</think>\n\n", "<think>\nwhy\n</think>\n\nso"]

plain_texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=4).map("".join)
texts = st.lists(
    st.sampled_from(PIECES + THINKING) | st.text(max_size=5), max_size=4
).map("".join)  # fmt: skip


def talks(contents):
    return st.lists(st.tuples(plain_texts, contents), min_size=1, max_size=4).map(
        lambda pairs: [content for pair in pairs for content in pair]
    )


def tokenize_one(talk, tokenizer, **options):
    (result,) = tokenize_conversations([talk], tokenizer, **options)
    if isinstance(result, FaultyRow):
        raise result
    return result


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=60)
@given(data=st.data())
def test_the_mask_is_right_decoded_targets_are_the_replies_and_their_end_marks(template, data):
    talk = conversation(*data.draw(talks(texts)))
    tokenizer = tokenizer_of(template)
    example = tokenize_one(talk, tokenizer)
    messages = without_ends(template, talk)
    expected = shown_replies(template, messages)
    assert decoded_targets(example, tokenizer) == "".join(expected)
    if template != "phi":  # its special tokens take blanks with them
        assert tokenizer.decode(example.input_ids) == shown_text(template, messages)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=40)
@given(data=st.data())
def test_the_tokens_before_an_answer_are_those_of_the_prompt_at_inference(template, data):
    """Not so in these cases.

    Behind an earlier reply that begins with a blank, the text was cut between the template and the
    reply, as it was when the reply was written; a prompt that holds the reply as history is one
    text, and may join the two in one token. Where a prompt ends with `<think>`, which the template
    leaves out of earlier turns, only the last turn can be like it, and none where it is left out of
    all (DeepSeek). Where it ends with an empty thinking block, no reply with thinking can be.
    """
    talk = conversation(*data.draw(talks(texts)))
    tokenizer = tokenizer_of(template)
    example = tokenize_one(talk, tokenizer)
    turns = list(
        zip(
            range(1, len(talk.messages), 2),
            shown_replies(template, without_ends(template, talk)),
            strict=True,
        )
    )
    if template == "deepseek":
        turns = []
    if template == "thinking_only":
        turns = [] if any(text[:1].isspace() for _, text in turns[:-1]) else turns[-1:]
    for turn, shown in turns:
        if template == "minimind" and split_thinking(talk.messages[turn].content)[0]:
            continue
        prompt_ids = ids_of_prompt(talk.messages[:turn], tokenizer)
        assert example.input_ids[: len(prompt_ids)] == prompt_ids
        place = len(prompt_ids)
        assert example.labels[place] != IGNORE_INDEX
        assert place == 0 or example.labels[place - 1] == IGNORE_INDEX
        if shown[:1].isspace():
            break


@pytest.mark.parametrize("template", TEMPLATES)
def test_eighty_turns_are_masked_as_one_is(template):
    contents = [f"{number}: <|im_start|>assistant\n灯塔?" for number in range(160)]
    talk, tokenizer = conversation(*contents), tokenizer_of(template)
    example = tokenize_one(talk, tokenizer)
    assert decoded_targets(example, tokenizer) == "".join(shown_replies(template, talk.messages))


@pytest.mark.parametrize("template", KNOWS_SYSTEM)
def test_the_system_message_of_the_recipe_opens_a_talk_that_has_none(template):
    tokenizer = tokenizer_of(template)
    without = tokenize_one(conversation("q", "a"), tokenizer, system="Be brief.")
    own = tokenize_one(conversation("q", "a", system="Be kind."), tokenizer, system="Be brief.")
    assert "Be brief." in tokenizer.decode(without.input_ids)
    assert "Be kind." in tokenizer.decode(own.input_ids)
    assert "Be brief." not in tokenizer.decode(own.input_ids)


def test_only_the_last_reply_counts_for_last_assistant(tokenizer):
    talk = conversation("q", "one", "q", "two")
    example = tokenize_one(talk, tokenizer, targets="last_assistant")
    assert decoded_targets(example, tokenizer) == "two<|im_end|>"


def test_every_token_but_the_first_counts_for_all(tokenizer):
    example = tokenize_one(conversation("q", "a"), tokenizer, targets="all")
    assert example.labels == [IGNORE_INDEX, *example.input_ids[1:]]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("assistant", "one<|im_end|>three<|im_end|>"),
        ("last_assistant", "three<|im_end|>"),
        ("all", None),
    ],
)
def test_a_turn_that_is_not_to_be_learned_is_context_only(targets, expected, tokenizer):
    talk = conversation("q", "one", "q", "two", "q", "three", "q", "four")
    unlearned = [3, 7]
    messages = tuple(
        replace(message, learned=number not in unlearned)
        for number, message in enumerate(talk.messages)
    )
    whole = tokenize_one(talk, tokenizer, targets=targets)
    example = tokenize_one(replace(talk, messages=messages), tokenizer, targets=targets)
    assert example.input_ids == whole.input_ids
    decoded = decoded_targets(example, tokenizer)
    if expected is None:
        expected = decoded_targets(whole, tokenizer)
        expected = expected.replace("two<|im_end|>", "").replace("four<|im_end|>", "")
    assert decoded == expected


def test_a_talk_without_a_turn_to_learn_has_no_targets(tokenizer):
    messages = (Message("user", "q"), Message("assistant", "a", learned=False))
    example = tokenize_one(Conversation(messages, Origin(Path("a.jsonl"), 1)), tokenizer)
    assert set(example.labels) == {IGNORE_INDEX}


@pytest.mark.parametrize("targets", ["assistant", "all"])
def test_where_only_the_next_role_ends_a_turn_the_last_one_gets_the_tokenizers_end_mark(targets):
    tokenizer = tokenizer_of("glm")
    assert tokenizer.eos_token == "<|endoftext|>"
    example = tokenize_one(conversation("q", "a", "q", "b"), tokenizer, targets=targets)
    assert example.labels[-1] == tokenizer.eos_token_id
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assert example.labels.count(user) == (1 if targets == "assistant" else 2)


def test_where_nothing_ends_a_turn_and_the_tokenizer_has_no_end_mark_the_template_is_refused():
    tokenizer = train_tokenizer(["ab"], 300)
    tokenizer.chat_template = "{% for m in messages %}{{ '<|im_start|>' + m.content }}{% endfor %}"
    assert tokenize_one(conversation("q", "a"), tokenizer).input_ids
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="writes no end-of-turn token"):
        tokenize_one(conversation("q", "a"), tokenizer)


def test_chunks_are_tokenized_as_the_whole_is(tokenizer):
    document = Conversation((Message("text", "雾港"),), Origin(Path("a.txt"), 1))
    bad = conversation("q", "a", system="s", row=0)
    talks = [conversation("q", "a" * row, row=row) for row in range(1, 6)] + [document, bad]
    whole = tokenize_conversations(talks, tokenizer)
    chunks = list(tokenize_chunks([talks[:2], [], talks[2:3], talks[3:]], tokenizer))
    assert [len(chunk) for chunk in chunks] == [2, 0, 1, 4]
    assert [result.example() for chunk in chunks for result in chunk] == whole


def test_every_token_of_a_document_counts_and_it_ends_with_the_end_mark(tokenizer):
    document = Conversation((Message("text", " 雾港 \n"),), Origin(Path("a.txt"), 1))
    example = tokenize_one(document, tokenizer)
    assert tokenizer.decode(example.input_ids) == " 雾港 \n<|im_end|>"
    assert example.labels == [IGNORE_INDEX, *example.input_ids[1:]]


def test_a_document_begins_with_the_mark_that_the_tokenizer_puts_there():
    tokenizer = train_tokenizer(["ab"], 300)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    document = Conversation((Message("text", "ab"),), Origin(Path("a.txt"), 1))
    example = tokenize_one(document, tokenizer)
    assert tokenizer.decode(example.input_ids) == "<s>ab<|im_end|>"


def test_a_document_keeps_its_outer_blanks_where_offsets_leave_them_out():
    tokenizer = train_tokenizer(["ab"], 300)
    tokenizer.eos_token = None
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    document = Conversation((Message("text", "  ab  "),), Origin(Path("a.txt"), 1))
    example = tokenize_one(document, tokenizer)
    assert tokenizer.decode(example.input_ids) == "  ab  "
    assert example.labels == [IGNORE_INDEX, *example.input_ids[1:]]


def test_a_reply_is_cut_off_where_a_token_would_reach_over_its_border():
    tokenizer = tokenizer_of("chatml")
    newlines = tokenizer("\n\n")["input_ids"]
    assert len(newlines) == 1, "the trap: both line ends are one token"
    example = tokenize_one(conversation("q", "\nlighthouse"), tokenizer)
    assert newlines[0] not in example.input_ids
    assert decoded_targets(example, tokenizer) == "\nlighthouse<|im_end|>"


@pytest.mark.parametrize("reply", ["  lighthouse", " ", "lighthouse  ", "a b"])
def test_blanks_of_a_reply_are_learned_where_offsets_leave_them_out(reply):
    tokenizer = train_tokenizer(["a  lighthouse"] * 3, 400)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    example = tokenize_one(conversation("q", reply), tokenizer)
    assert decoded_targets(example, tokenizer) == f"{reply}<|im_end|>"


def test_an_end_mark_that_takes_the_line_end_with_it_is_learned_whole():
    tokenizer = train_tokenizer(["ab"], 300)
    marks = [AddedToken(text, special=True, rstrip=True) for text in ("<|end|>", "<|bot|>")]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|bot|>\n' if m.role == 'assistant' }}"
        "{{ m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|bot|>\n' }}{% endif %}"
    )
    talk = conversation("q", "a", "q", "b")
    example = tokenize_one(talk, tokenizer)
    assert decoded_targets(example, tokenizer) == "a<|end|>b<|end|>"
    whole = tokenizer(prompt_text(talk.messages[:3], tokenizer), add_special_tokens=False)
    assert example.input_ids[: len(whole["input_ids"])] == whole["input_ids"]


def test_faulty_talks_stand_in_their_places_among_the_examples():
    tokenizer = tokenizer_of("gemma")
    good, bad = conversation("q", "a"), conversation("q", "a", system="s")
    results = tokenize_conversations([bad, good, bad], tokenizer)
    assert [isinstance(result, FaultyRow) for result in results] == [True, False, True]
    assert str(results[0]) == "the chat template rejects it: System role not supported"


def test_nothing_is_made_of_nothing(tokenizer):
    assert tokenize_conversations([], tokenizer) == []


def test_a_tokenizer_without_a_chat_template_is_refused_for_talks_but_not_for_documents():
    tokenizer = train_tokenizer(["ab"], 300)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"no chat template\. Set model\.chat_template to a"):
        tokenize_conversations([conversation("q", "a")], tokenizer)
    document = Conversation((Message("text", "ab"),), Origin(Path("a.txt"), 1))
    assert tokenize_one(document, tokenizer).input_ids


def test_a_tokenizer_that_knows_no_offsets_is_refused():
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(ModelError, match=r"SlowTokenizer returns no.*tokenizer\.json"):
        tokenize_conversations([conversation("q", "a")], SlowTokenizer())


def test_a_prompt_that_the_template_refuses_is_the_users_to_mend():
    with pytest.raises(ModelError, match="only user and assistant speak here"):
        prompt_text(conversation("q", system="s").messages, tokenizer_of("mistral"))
