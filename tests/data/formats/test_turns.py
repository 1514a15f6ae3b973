"""A list of turns becomes messages in an order that can be learned, or is refused."""

import itertools
import re

import pytest

from yrunner.data.conversation import FaultyRow, Message
from yrunner.data.formats.turns import ROLES, check_turns, read_history, read_turns

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
NOT_A_CHOICE = "not 0 or 1 (false or true)"
FRACTION = f"{NOT_A_CHOICE}; a reply is learned in full or not at all"
CALL = {"type": "function", "function": {"name": "tide", "arguments": {"town": "雾港"}}}
TALK = re.compile(r"s?(ua(t+a)*)+")
"""Which orders of roles can be learned, by their first letters."""


def read(turns):
    messages = read_turns(turns, "messages")
    check_turns(messages)
    return messages


def fault_of(turns):
    with pytest.raises(FaultyRow) as refused:
        read(turns)
    assert "\n" not in str(refused.value)
    return refused.value.kind, str(refused.value)


@pytest.mark.parametrize("number", range(6))
def test_exactly_the_orders_that_can_be_learned_are_taken(number):
    for roles in itertools.product(("system", "user", "assistant", "tool"), repeat=number):
        can_be_learned = TALK.fullmatch("".join(role[0] for role in roles)) is not None
        try:
            check_turns([Message(role, "x") for role in roles])
        except FaultyRow as fault:
            assert fault.kind == "roles"
            assert not can_be_learned, roles
        else:
            assert can_be_learned, roles


@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("name", [name for name in ROLES if name != "function_call"])
def test_every_name_of_a_role_is_read_in_any_case(name, keys):
    for spelled in (name, name.title(), name.upper()):
        turn = dict(zip(keys, (spelled, "x"), strict=True))
        assert read_turns([turn], "turns") == (Message(ROLES[name], "x"),)


@pytest.mark.parametrize(
    ("turns", "kind", "reason"),
    [
        ([], "empty", '"messages" has no messages'),
        ("q", "wrong_type", '"messages" is text, not a list of messages'),
        (None, "wrong_type", '"messages" is null, not a list of messages'),
        (
            [USER, ["assistant", "a"]],
            "wrong_type",
            "message 2 is a list, not an object with role and content",
        ),
        (
            [{**USER, "value": "p"}, REPLY],
            "wrong_type",
            'message 1 has both "content" and "value"',
        ),
        ([USER, {"content": "a"}], "missing_field", 'message 2 has no "role" and no "from"'),
        (
            [USER, {"role": "assistant"}],
            "wrong_type",
            "message 2 (assistant): content is null, not text",
        ),
        (
            [USER, {**REPLY, "content": 7}],
            "wrong_type",
            "message 2 (assistant): content is a number, not text",
        ),
        (
            [{"human": "q", "assistant": "a"}, {"human": "q"}],
            "wrong_type",
            "message 4 (assistant): content is null, not text",
        ),
        ([USER], "roles", "has no assistant message, so there is nothing to train on"),
        ([REPLY], "roles", "the conversation starts with assistant, not user"),
        ([USER, REPLY, USER], "roles", "the conversation ends with user, not assistant"),
        ([USER, USER, REPLY], "roles", "message 2 (user) cannot follow a message with role user"),
        (
            [USER, REPLY, REPLY],
            "roles",
            "message 3 (assistant) cannot follow a message with role assistant",
        ),
        (
            [USER, {"role": "system", "content": "s"}, REPLY],
            "roles",
            "message 2 is a system message; only the first message can be one",
        ),
        (
            [{**USER, "content": "\n"}, REPLY],
            "empty",
            "message 1 (user), the last question, is empty",
        ),
        (
            [USER, {**REPLY, "content": " "}],
            "empty",
            "message 2 (assistant), the last reply, is empty",
        ),
    ],
)
def test_turns_that_cannot_be_learned_are_refused(turns, kind, reason):
    assert fault_of(turns) == (kind, reason)


@pytest.mark.parametrize(
    ("role", "said"),
    [
        ("narrator", '"narrator"'),
        ("text", '"text"'),
        (["user"], "a list"),
        ("x" * 999 + "\ud800", f'"{"x" * 40}..."'),
    ],
)
def test_an_unknown_role_is_refused_with_those_that_are_known(role, said):
    known = ", ".join(ROLES)
    fault = fault_of([USER, {"role": role, "content": "a"}])
    assert fault == ("roles", f"message 2 has role {said}; use one of {known}")


def test_an_empty_turn_that_is_not_the_last_is_context():
    turns = [{**USER, "content": ""}, {**REPLY, "content": ""}, USER, REPLY]
    assert [message.content for message in read(turns)] == ["", "", "q", "a"]


def test_keys_that_are_null_or_empty_change_nothing():
    reply = {**REPLY, "content": "a\x00b", "tool_calls": None, "refusal": None, "audio": {}}
    assert read([USER, reply])[1] == Message("assistant", "a\x00b")


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({**REPLY, "mask": 1}, '"mask", which is not supported'),
        ({**REPLY, "refusal": "no"}, '"refusal", which is not supported'),
        ({**REPLY, "train_detail": [{"x": 1}]}, '"train_detail", which is not supported'),
        ({**REPLY, "tools": [{"name": "t"}]}, '"tools", which is not supported'),
        ({**REPLY, "reasoning": ["hm"]}, '"reasoning" is a list, not text'),
        (
            {**REPLY, "reasoning": "hm", "thinking": "oh"},
            "different texts in reasoning and thinking",
        ),
        ({**REPLY, "content": "</think>", "thinking": "oh"}, "</think> in its text"),
        ({**REPLY, "tool_calls": [CALL], "function_call": CALL}, "tool_calls and function_call"),
    ],
)
def test_what_a_turn_says_beside_its_text_is_never_left_out_quietly(turn, reason):
    kind, said = fault_of([USER, turn])
    assert kind == "wrong_type"
    assert said.startswith("message 2 (assistant)")
    assert reason in said


@pytest.mark.parametrize("key", ["tool_calls", "function_call", "reasoning_content"])
def test_only_an_assistant_thinks_and_calls(key):
    reason = f'message 1 (user) has "{key}", which is not supported'
    assert fault_of([{**USER, key: [CALL]}, REPLY]) == ("wrong_type", reason)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_stand_before_the_reply_where_templates_look_for_them(key):
    (_, reply) = read([USER, {**REPLY, key: "\nhm\n"}])
    assert reply.content == "<think>\nhm\n</think>\n\na"
    assert read([USER, {**REPLY, key: " \n"}])[1] == Message("assistant", "a")


def test_texts_of_several_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image_url": None}]
    assert read([{**USER, "content": parts}, REPLY])[0].content == "ab"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "value": "灯\n"},
        {"type": "text", "text": None, "value": "灯\n", "image": None},
        {"type": "text", "content": "灯\n"},
        {"type": "output_text", "text": "灯\n", "annotations": []},
        {"text": "灯\n"},
        "灯\n",
    ],
)
def test_the_text_of_a_part_is_found_under_every_name(part):
    reply = {"role": "assistant", "content": [part, "b"], "loss_weight": 1.0}
    assert read([USER, reply])[1] == Message("assistant", "灯\nb")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, '"image_url"'),
        ({"type": "text", "text": None}, '"text"'),
        ({"type": "image", "text": "a lamp"}, '"image"'),
        ({"type": "thinking", "thinking": "hm"}, '"thinking"'),
        ({"type": "text", "text": "a", "value": "b"}, '"text"'),
        (7, "a number"),
        ({}, "null"),
    ],
)
def test_a_part_that_is_no_text_is_refused(part, said):
    fault = fault_of([{**USER, "content": [part]}, REPLY])
    reason = f"message 1 (user): a content part ({said}) is not text"
    assert fault == ("wrong_type", reason)


@pytest.mark.parametrize(
    "off",
    [
        {"train": False},
        {"train": 0},
        {"weight": 0},
        {"weight": 0.0},
        {"loss": False},
        {"loss_weight": 0.0},
        {"loss_scale": 0},
        {"train_on_turn": False},
        {"loss_mask": 0},
    ],
)
@pytest.mark.parametrize("on", [{}, {"train": True}, {"weight": 1}, {"train": None}])
def test_replies_are_chosen_one_by_one(off, on):
    messages = read([{**USER, **off}, {**REPLY, **off}, USER, {**REPLY, **on}])
    assert [message.learned for message in messages] == [True, False, True, True]


@pytest.mark.parametrize(
    ("turns", "kind", "reason"),
    [
        ([USER, {**REPLY, "weight": 0.5}], "wrong_type", f"weight is 0.5, {FRACTION}"),
        ([USER, {**REPLY, "loss_weight": 0.3}], "wrong_type", f"loss_weight is 0.3, {FRACTION}"),
        ([USER, {**REPLY, "loss_scale": 2.0}], "wrong_type", f"loss_scale is 2.0, {FRACTION}"),
        ([USER, {**REPLY, "weight": "0"}], "wrong_type", f'weight is "0", {NOT_A_CHOICE}'),
        ([USER, {**REPLY, "train": 2}], "wrong_type", f"train is 2, {NOT_A_CHOICE}"),
        ([USER, {**REPLY, "train": "no"}], "wrong_type", f'train is "no", {NOT_A_CHOICE}'),
        (
            [USER, {**REPLY, "train": True, "weight": 0}],
            "wrong_type",
            "train and weight contradict each other",
        ),
        (
            [{**USER, "weight": 1}, REPLY],
            "roles",
            "has weight, but only replies can be trained on",
        ),
        (
            [USER, {**REPLY, "train": False}],
            "no_targets",
            "every reply is excluded, by train: false, weight: 0 or the like",
        ),
    ],
)
def test_a_choice_that_is_not_clear_is_refused(turns, kind, reason):
    found, said = fault_of(turns)
    assert (found, said.split("): ")[-1]) == (kind, reason)


def test_an_empty_reply_that_calls_or_is_switched_off_may_be_the_last():
    calling = {"role": "assistant", "tool_calls": [CALL]}
    assert read([USER, calling])[1] == Message("assistant", "", tool_calls=(CALL,))
    silent = {**REPLY, "content": "", "train": False}
    assert read([USER, REPLY, USER, silent])[3] == Message("assistant", "", learned=False)


def test_a_result_names_its_tool_and_its_call():
    result = {"role": "tool", "content": "7", "name": "tide", "tool_call_id": "c1"}
    extras = {"name": "tide", "tool_call_id": "c1"}
    assert read([USER, REPLY, result, REPLY])[2] == Message("tool", "7", extras=extras)
    for value, kind in ((7, "wrong_type"), ("\ud800", "characters")):
        assert fault_of([USER, REPLY, {**result, "name": value}, REPLY])[0] == kind


def test_a_turn_that_only_calls_may_think_before():
    call = '{"name": "tide", "arguments": {"town": "雾港"}}'
    for value, thought in (
        (call, ""),
        (f"<think>\nhm\n</think>\n\n{call}", "<think>\nhm\n</think>"),
    ):
        messages = read([USER, {"from": "function_call", "value": value}])
        assert messages[1] == Message("assistant", thought, tool_calls=(CALL,))


def test_a_turn_that_calls_nothing_readable_is_refused():
    kind, reason = fault_of([USER, {"from": "function_call", "value": "tide()"}])
    assert kind == "wrong_type"
    assert reason.startswith("message 2 (assistant): the tool call is not valid JSON")
    for nothing in ("", None, "<think>hm", "<think>hm</think>"):
        fault = fault_of([USER, {"from": "function_call", "value": nothing}])
        assert fault == ("empty", "message 2 (function_call) has no call")


def test_a_history_is_pairs_or_messages_or_nothing():
    messages = (Message("user", "q"), Message("assistant", "a"))
    assert read_history([["q", "a"]]) == read_history([USER, REPLY]) == messages
    for nothing in (None, "", []):
        assert read_history(nothing) == ()
