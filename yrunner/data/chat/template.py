"""Render conversations with the model's own chat template, as at inference."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from yrunner.data.conversation import FaultyRow, Message
from yrunner.errors import ModelError
from yrunner.tokens import TEMPLATE_ERRORS

CharSpan = tuple[int, int]
"""Start and end of a piece of text, in characters."""

GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
THINKING_BLOCK = re.compile(rf"\s*{THINK_OPEN}\n?(.*?)\n?{THINK_CLOSE}\n{{0,2}}", re.DOTALL)


@dataclass(frozen=True)
class ThinkingKeys:
    """Keys of a message under which a chat template reads the thinking before a reply."""

    plain: str
    calling: str
    """In a message that calls tools."""


@dataclass(frozen=True)
class Chat:
    """A conversation in the form that chat templates read, but for the key of thinking."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    thinking_keys: ThinkingKeys | None = None
    """The template's keys in place of `thinking`; None if no message has it."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of each message."""
        return tuple(message["role"] for message in self.messages)

    @property
    def has_calls(self) -> bool:
        """Whether any message calls a tool."""
        return any("tool_calls" in message for message in self.messages)

    @property
    def for_template(self) -> list[dict[str, Any]]:
        """The messages with the template's own key for thinking."""
        if self.thinking_keys is None:
            return self.messages
        return [_with_key(message, self.thinking_keys) for message in self.messages]


def _with_key(message: dict[str, Any], keys: ThinkingKeys) -> dict[str, Any]:
    if "thinking" not in message:
        return message
    key = keys.calling if "tool_calls" in message else keys.plain
    others = {name: value for name, value in message.items() if name != "thinking"}
    return {**others, key: message["thinking"]}


def as_chat(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    arguments_as_text: bool = False,
    thinking_keys: ThinkingKeys | None = None,
) -> Chat:
    """The chat of these messages.

    Most chat templates expect the arguments of a call as an object; `arguments_as_text` is for
    those that expect JSON text (DeepSeek's). With `thinking_keys` the thinking block that opens a
    reply is taken out of its content.
    """
    shown = [_as_dict(message, arguments_as_text) for message in messages]
    if thinking_keys is not None:
        shown = [_split_thinking(message) for message in shown]
    if not any("thinking" in message for message in shown):
        thinking_keys = None
    return Chat(shown, [dict(tool) for tool in tools] or None, thinking_keys)


def _split_thinking(message: dict[str, Any]) -> dict[str, Any]:
    block = THINKING_BLOCK.match(message["content"]) if message["role"] == "assistant" else None
    if block is None or not block[1].strip():
        return message
    return {**message, "thinking": block[1], "content": message["content"][block.end() :]}


def render(chat: Chat, tokenizer: Any, *, for_answer: bool = False) -> str:
    """The text of a chat; `for_answer` adds the generation prompt.

    Raises `FaultyRow` if the template rejects the chat.
    """
    return _render(chat, tokenizer, add_generation_prompt=for_answer)[0]


def render_all(chats: Sequence[Chat], tokenizer: Any) -> list[str | FaultyRow]:
    """The text of each chat, or its fault; faster than one by one, unless a chat is faulty.

    No chat may have tools, because transformers passes the same tools to all.
    """
    try:
        texts, _ = render_jinja_template(
            conversations=[chat.for_template for chat in chats],
            chat_template=chat_template_of(tokenizer, Chat([])),
            **tokenizer.special_tokens_map,
        )
    except TEMPLATE_ERRORS:
        return [render_or_fault(chat, tokenizer) for chat in chats]
    return list(texts)


def render_or_fault(chat: Chat, tokenizer: Any) -> str | FaultyRow:
    """`render`, but return the fault."""
    try:
        return render(chat, tokenizer)
    except FaultyRow as fault:
        return fault


def render_with_generation(chat: Chat, tokenizer: Any) -> tuple[str, list[CharSpan]]:
    """The text of a chat, and the spans in the template's `{% generation %}` blocks.

    A reply may have several blocks, such as one for its end mark (TRL's template for Phi-3): the
    model writes what is between them, too. Raises `FaultyRow` if the template rejects the chat, or
    if a reply has no block.
    """
    text, blocks = _render(chat, tokenizer, return_assistant_tokens_mask=True)
    num_replies = chat.roles.count("assistant")
    if len(blocks) == num_replies:
        return text, blocks
    turns = _turns_of_blocks(chat, tokenizer)
    if len(turns) != len(blocks) or len(set(turns)) != num_replies:
        raise FaultyRow(
            f"the chat template has {len(blocks)} generation blocks for {num_replies} replies",
            "template",
        )
    found: dict[int, CharSpan] = {}
    for turn, (start, end) in zip(turns, blocks, strict=True):
        if turn not in found:
            found[turn] = start, end
        elif start < end:
            found[turn] = found[turn][0], end
    return text, list(found.values())


def _turns_of_blocks(chat: Chat, tokenizer: Any) -> list[int]:
    """The turn before each generation block, found by keys in place of what others say."""
    separator = unused_mark(chat)
    masked = [
        message
        if message["role"] == "assistant"
        else {**message, "content": f"{separator}{turn}{separator}"}
        for turn, message in enumerate(chat.messages)
    ]
    text, blocks = _render(
        replace(chat, messages=masked), tokenizer, return_assistant_tokens_mask=True
    )
    keys = [
        (int(key[1]), key.end()) for key in re.finditer(f"{separator}([0-9]+){separator}", text)
    ]
    return [max((turn for turn, end in keys if end <= start), default=-1) for start, _ in blocks]


def marks_generation(chat: Chat, tokenizer: Any) -> bool:
    """Whether the template for this chat has `{% generation %}` blocks."""
    return GENERATION_MARK.search(chat_template_of(tokenizer, chat)) is not None


def chat_template_of(tokenizer: Any, chat: Chat) -> str:
    """The template for this chat: a model may have another one for chats with tools.

    Raises `ModelError` if there is none.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        with_tools = template.get("tool_use") if chat.tools else None
        template = with_tools or template.get("default")
    if not template:
        raise ModelError(
            "the tokenizer has no chat template",
            remedy="set model.chat_template to a .jinja file",
        )
    return str(template)


def _as_dict(message: Message, arguments_as_text: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.extras:
        shown |= message.extras
    if message.tool_calls:
        shown["tool_calls"] = [_as_call(call, arguments_as_text) for call in message.tool_calls]
    return shown


def _as_call(call: Mapping[str, Any], arguments_as_text: bool) -> dict[str, Any]:
    if not arguments_as_text:
        return dict(call)
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _render(chat: Chat, tokenizer: Any, **options: bool) -> tuple[str, list[CharSpan]]:
    """The text of one chat and, if the options request them, its generation spans."""
    try:
        texts, spans = render_jinja_template(
            conversations=[chat.for_template],
            tools=chat.tools,
            chat_template=chat_template_of(tokenizer, chat),
            **options,
            **tokenizer.special_tokens_map,
        )
    except TEMPLATE_ERRORS as error:
        raise FaultyRow(f"the chat template rejects it: {error}", "template") from error
    return str(texts[0]), [(start, end) for start, end in spans[0]] if spans else []


PRIVATE_USE = range(0xF0000, 0xFFFFE)
"""Characters without a meaning in Unicode."""

UNKNOWN, THOUGHT = chr(PRIVATE_USE[0]), chr(PRIVATE_USE[1])
"""Placeholders for the text and the thinking of a message."""
KNOWN_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
THINKING_NAME = re.compile(
    r"\b(?:\w*(?:think|thought|reason)\w*|tool_plan|analysis|rationale|scratchpad|cot)\b"
)
"""Names in a template that may be keys of thinking."""
USER = {"role": "user", "content": UNKNOWN}
REPLY = {"role": "assistant", "content": UNKNOWN}
CALL_NAME, CALL_ID = "look_up", "call00001"  # Mistral's templates want nine characters
RESULT = {"role": "tool", "content": UNKNOWN, "name": CALL_NAME, "tool_call_id": CALL_ID}
TOOL = {
    "type": "function",
    "function": {
        "name": CALL_NAME,
        "description": "Looks it up.",
        "parameters": {"type": "object", "properties": {}},
    },
}


@dataclass(frozen=True)
class TurnMarks:
    """What a chat template writes around the turns of the assistant."""

    openings: Mapping[str, str]
    """The generation prompt, by the role of the message before it."""
    headers: Mapping[str, str]
    """The text before a reply in a finished conversation, by the role of the message before it."""
    special: tuple[str, ...]
    """Special tokens, longest first: any of them may end a turn."""
    ends: tuple[str, ...]
    """Special tokens that were seen to end a turn."""
    ends_of_calls: tuple[str, ...]
    """The same for a turn that calls tools: gpt-oss ends it with <|call|>."""
    swallowing: tuple[str, ...]
    """Special tokens that include the whitespace after them (Phi's `rstrip`)."""
    closing: str
    """What to add after a conversation's last reply.

    GLM's template ends a turn with the role token of the next one, so the last turn has no end. Add
    the tokenizer's EOS token there; those models stop at it, too.
    """
    ends_are_marked: bool
    """Whether `{% generation %}` blocks include the end-of-turn token."""
    arguments_as_text: bool
    """Whether the template expects the arguments of a call as JSON text."""
    shows_tools: bool
    """Whether the template renders the tools."""
    thinking_keys: ThinkingKeys | None
    """Where the template reads the thinking of a message; None if it reads no such key."""


def read_turn_marks(tokenizer: Any) -> TurnMarks:
    """Render short conversations of placeholders. Raises `ModelError` if there is no template."""
    tokens = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = {text for text in (*tokenizer.all_special_tokens, *map(str, tokens)) if text}
    longest_first = tuple(sorted(special, key=len, reverse=True))
    ends, closing = _ends(tokenizer, longest_first)
    after_call, arguments_as_text = _call(tokenizer)
    call = _render_or_nothing(Chat(after_call.messages[:2]), tokenizer).rstrip()
    call_ends = {token for token in longest_first if CALL_NAME in call and call.endswith(token)}
    openings = {"user": _opening(Chat([USER]), tokenizer), "tool": _opening(after_call, tokenizer)}
    headers = {"user": _header(Chat([USER]), tokenizer), "tool": _header(after_call, tokenizer)}
    return TurnMarks(
        openings={role: text for role, text in openings.items() if text is not None},
        headers={role: text for role, text in headers.items() if text is not None},
        special=longest_first,
        ends=ends,
        ends_of_calls=tuple(sorted({*ends, *call_ends})),
        swallowing=tuple(str(token) for token in tokens if token.rstrip),
        closing=closing,
        ends_are_marked=_ends_are_marked(tokenizer, longest_first),
        arguments_as_text=arguments_as_text,
        shows_tools=_shows_tools(tokenizer),
        thinking_keys=find_thinking_keys(tokenizer),
    )


def find_thinking_keys(tokenizer: Any) -> ThinkingKeys | None:
    """The keys of thinking whose text the template shows, among all that it names."""
    source = chat_template_of(tokenizer, Chat([USER], [TOOL])) + chat_template_of(
        tokenizer, Chat([USER])
    )
    names = list(dict.fromkeys([*KNOWN_KEYS, *sorted(THINKING_NAME.findall(source))]))
    names = [name for name in names if name in source]
    plain = next((name for name in names if _shows(name, tokenizer, calls=False)), None)
    calling = next((name for name in names if _shows(name, tokenizer, calls=True)), None)
    if plain is None and calling is None:
        return None
    return ThinkingKeys(plain or calling or "", calling or plain or "")


def _shows(name: str, tokenizer: Any, *, calls: bool) -> bool:
    """Whether the template shows what a message has under a key."""
    reply = {**REPLY, name: THOUGHT}
    if not calls:
        return THOUGHT in _render_or_nothing(Chat([USER, reply]), tokenizer)
    forms: tuple[Any, ...] = ({}, "{}")
    for arguments in forms:
        function = {"name": CALL_NAME, "arguments": arguments}
        call = {"id": CALL_ID, "type": "function", "function": function}
        talk = Chat([USER, {**reply, "content": "", "tool_calls": [call]}])
        if THOUGHT in _render_or_nothing(talk, tokenizer):
            return True
    return False


def unused_mark(chat: Chat) -> str:
    """A character that does not occur in the chat."""
    used = set(chain.from_iterable(message["content"] for message in chat.messages))
    if chat.has_calls or chat.thinking_keys:
        used |= set(json.dumps(chat.messages, ensure_ascii=False, default=str))
    return next(chr(code) for code in PRIVATE_USE if chr(code) not in used)


def _ends(tokenizer: Any, special: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """`TurnMarks.ends` and `TurnMarks.closing`."""
    found: set[str] = set()
    last_is_ended = True
    for talk in (
        Chat([USER, REPLY, USER, REPLY]),
        Chat([USER, REPLY, RESULT]),
        Chat([USER, REPLY]),
    ):
        # Every second message is a reply.
        after_replies = _render_or_nothing(talk, tokenizer).split(UNKNOWN)[2::2]
        for text in (after.lstrip() for after in after_replies):
            found.update(next(([token] for token in special if text.startswith(token)), []))
        if talk.roles[-1] == "assistant" and after_replies:
            last_is_ended = bool(after_replies[-1].strip())
    closing = ""
    if found and not last_is_ended and tokenizer.eos_token:
        closing = str(tokenizer.eos_token)
        found.add(closing)
    return tuple(sorted(found)), closing


def _ends_are_marked(tokenizer: Any, special: tuple[str, ...]) -> bool:
    talk = Chat([USER, REPLY])
    if not marks_generation(talk, tokenizer):
        return False
    try:
        text, spans = render_with_generation(talk, tokenizer)
    except FaultyRow as fault:
        raise ModelError(
            f"{fault} in a test conversation",
            remedy="set model.chat_template to another .jinja file",
        ) from fault
    return all(text[start:end].rstrip().endswith(special) for start, end in spans)


def _call(tokenizer: Any) -> tuple[Chat, bool]:
    """A chat with a call and its result, and `TurnMarks.arguments_as_text`."""
    for arguments, as_text in (({}, False), ("{}", True)):
        function: dict[str, Any] = {"name": CALL_NAME, "arguments": arguments}
        calls = [{"id": CALL_ID, "type": "function", "function": function}]
        call = {"role": "assistant", "content": "", "tool_calls": calls}
        talk = Chat([USER, call, RESULT])
        if _render_or_nothing(talk, tokenizer):
            return talk, as_text
    return talk, False


def _opening(talk: Chat, tokenizer: Any) -> str | None:
    """The generation prompt after the last message; None if it cannot be found."""
    _, shown, opening = _render_or_nothing(talk, tokenizer, for_answer=True).rpartition(UNKNOWN)
    return opening if shown else None


def _header(talk: Chat, tokenizer: Any) -> str | None:
    """The text between the last message and a reply; None if it cannot be found."""
    answered = Chat([*talk.messages, REPLY])
    pieces = _render_or_nothing(answered, tokenizer).split(UNKNOWN)
    return pieces[-2] if len(pieces) > 2 else None


def _shows_tools(tokenizer: Any) -> bool:
    with_tools = render_or_fault(Chat([USER], [TOOL]), tokenizer)
    without = render_or_fault(Chat([USER]), tokenizer)
    return not isinstance(with_tools, FaultyRow) and with_tools != without


def _render_or_nothing(talk: Chat, tokenizer: Any, *, for_answer: bool = False) -> str:
    # Some templates, such as Hermes', are for chats with tools only.
    for tools in (talk.tools, [TOOL]):
        try:
            return render(replace(talk, tools=tools), tokenizer, for_answer=for_answer)
        except FaultyRow:
            continue
    return ""
