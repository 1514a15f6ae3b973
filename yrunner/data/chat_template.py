"""Messages to text: the model's own chat template writes it, here and at inference."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from yrunner.data.conversation import FaultyRow, Message
from yrunner.errors import ModelError

Span = tuple[int, int]
"""First character of a piece of text, and the one after its last."""

GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

# A template calls methods on what it is given, and Jinja passes their errors on.
TEMPLATE_ERRORS = (TemplateError, TypeError, AttributeError)


@dataclass(frozen=True)
class Chat:
    """A conversation in the form that chat templates read."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """Who speaks, turn by turn."""
        return tuple(message["role"] for message in self.messages)

    @property
    def has_calls(self) -> bool:
        """Whether the assistant calls a tool anywhere."""
        return any("tool_calls" in message for message in self.messages)


def as_chat(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    arguments_as_text: bool = False,
) -> Chat:
    """The chat of these messages.

    Most chat templates want the arguments of a call as an object; `arguments_as_text` is for those
    that want JSON text (DeepSeek's).
    """
    return Chat(
        [_as_dict(message, arguments_as_text) for message in messages],
        [dict(tool) for tool in tools] or None,
    )


def render(chat: Chat, tokenizer: Any, *, for_answer: bool = False) -> str:
    """The text of a chat; `for_answer` opens the assistant's next turn at its end.

    Raises `FaultyRow` where the template refuses the chat.
    """
    return _render(chat, tokenizer, add_generation_prompt=for_answer)[0]


def render_all(chats: Sequence[Chat], tokenizer: Any) -> list[str | FaultyRow]:
    """The text of every chat, or why it has none; faster than one by one as long as none is faulty.

    No chat may have tools: these are the same for all that are rendered together.
    """
    try:
        texts, _ = render_jinja_template(
            conversations=[chat.messages for chat in chats],
            chat_template=chat_template_of(tokenizer, Chat([])),
            **tokenizer.special_tokens_map,
        )
    except TEMPLATE_ERRORS:
        return [render_or_fault(chat, tokenizer) for chat in chats]
    return list(texts)


def render_or_fault(chat: Chat, tokenizer: Any) -> str | FaultyRow:
    """`render`, with the fault for a result."""
    try:
        return render(chat, tokenizer)
    except FaultyRow as fault:
        return fault


def render_with_generation(chat: Chat, tokenizer: Any) -> tuple[str, list[Span]]:
    """The text of a chat, and what the template's own `{% generation %}` marks enclose.

    Raises `FaultyRow` where the template refuses the chat, or marks more or less than its replies.
    """
    text, spans = _render(chat, tokenizer, return_assistant_tokens_mask=True)
    num_replies = chat.roles.count("assistant")
    if len(spans) != num_replies:
        raise FaultyRow(
            f"the chat template marks {len(spans)} pieces as generation, but the replies are "
            f"{num_replies}",
            "template",
        )
    return text, spans


def marks_generation(chat: Chat, tokenizer: Any) -> bool:
    """Whether the template that this chat gets has `{% generation %}` marks."""
    return GENERATION_MARK.search(chat_template_of(tokenizer, chat)) is not None


def chat_template_of(tokenizer: Any, chat: Chat) -> str:
    """The template for this chat: a model may have one of its own for chats with tools.

    Raises `ModelError` where there is none.
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


def _render(chat: Chat, tokenizer: Any, **options: bool) -> tuple[str, list[Span]]:
    """The text of one chat and, if they are asked for, the spans of its generation marks."""
    try:
        texts, spans = render_jinja_template(
            conversations=[chat.messages],
            tools=chat.tools,
            chat_template=chat_template_of(tokenizer, chat),
            **options,
            **tokenizer.special_tokens_map,
        )
    except TEMPLATE_ERRORS as error:
        raise FaultyRow(f"the chat template refuses it: {error}", "template") from error
    return str(texts[0]), [(start, end) for start, end in spans[0]] if spans else []
