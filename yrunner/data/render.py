"""Conversations to token ids and labels. This file alone decides which tokens are learned."""

from collections.abc import Sequence
from typing import Any, Literal

from yrunner.data.conversation import Conversation, FaultyRow, Message, TokenizedExample
from yrunner.data.spans import (
    Span,
    TurnMarks,
    as_chat,
    read_turn_marks,
    render,
    render_with_spans,
)
from yrunner.errors import ModelError, Origin
from yrunner.tokens import IGNORE_INDEX

Targets = Literal["assistant", "last_assistant", "all"]


def tokenize_conversations(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    *,
    system: str | None = None,
    targets: Targets = "assistant",
) -> list[TokenizedExample | FaultyRow]:
    """One example, or the reason why there is none, for each conversation, in order.

    `system` opens every conversation that has no system message of its own. The rendered texts are
    tokenized together, because a fast tokenizer spreads a list over all cores. Raises `ModelError`
    where the tokenizer or its chat template is of no use for any conversation.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} does not tell where in a text its tokens stand",
            remedy="use a model whose folder holds a tokenizer.json",
        )
    has_turns = any(not conversation.is_text for conversation in conversations)
    marks = read_turn_marks(tokenizer) if has_turns else None
    rendered: list[tuple[str, list[Span]] | FaultyRow] = []
    for conversation in conversations:
        try:
            if marks is None or conversation.is_text:
                rendered.append(_render_document(conversation.messages[0].content, tokenizer))
            else:
                messages = with_system(conversation.messages, system)
                rendered.append(_render_turns(messages, tokenizer, marks, targets))
        except FaultyRow as fault:
            rendered.append(fault)
    texts = [result[0] for result in rendered if not isinstance(result, FaultyRow)]
    if not texts:
        return [result for result in rendered if isinstance(result, FaultyRow)]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [
        result
        if isinstance(result, FaultyRow)
        else _label(*result, *next(tokens), tokenizer, conversation.origin)
        for result, conversation in zip(rendered, conversations, strict=True)
    ]


def prompt_text(messages: Sequence[Message], tokenizer: Any, system: str | None = None) -> str:
    """The text that a model answers at inference: the conversation, and an opened reply.

    Raises `ModelError` where the chat template refuses the conversation.
    """
    try:
        return render(as_chat(with_system(messages, system)), tokenizer, for_answer=True)
    except FaultyRow as fault:
        raise ModelError(
            str(fault), remedy="set model.chat_template to one that takes such conversations"
        ) from fault


def with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """The messages, opened by `system` where they bring no system message of their own."""
    if system is None or messages[0].role == "system":
        return tuple(messages)
    return (Message("system", system), *messages)


def _render_document(content: str, tokenizer: Any) -> tuple[str, list[Span]]:
    # A document ends with the end mark, or the model would learn that texts never stop.
    text = _begin_of_text(tokenizer) + content + (tokenizer.eos_token or "")
    return text, [(0, len(text))]


def _begin_of_text(tokenizer: Any) -> str:
    """The mark that this tokenizer puts before a text by itself, or nothing."""
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    return tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else ""


def _render_turns(
    messages: Sequence[Message], tokenizer: Any, marks: TurnMarks, targets: Targets
) -> tuple[str, list[Span]]:
    """The text of a conversation and the spans of it that are learned."""
    if targets == "all":
        text = render(as_chat(messages), tokenizer)
        return text, [(0, len(text))]
    text, spans = render_with_spans(messages, tokenizer, marks)
    return text, spans[-1:] if targets == "last_assistant" else spans


def _label(
    text: str,
    spans: list[Span],
    ids: list[int],
    offsets: list[Span],
    tokenizer: Any,
    origin: Origin,
) -> TokenizedExample:
    """Label the tokens inside the spans.

    Where a token would reach over the border of a span, the text is cut there and its parts are
    tokenized on their own, as they are at inference, where the prompt ends at the same place.
    """
    is_target = _tokens_inside(text, spans, offsets)
    if is_target is None:
        ids, is_target = _tokenize_parts(text, spans, tokenizer)
    labels = [id_ if target else IGNORE_INDEX for id_, target in zip(ids, is_target, strict=True)]
    if labels:
        labels[0] = IGNORE_INDEX
    return TokenizedExample(list(ids), labels, origin)


def _tokens_inside(text: str, spans: list[Span], offsets: list[Span]) -> list[bool] | None:
    """Which tokens lie in a span; None where one may lie across a border. Both are in order.

    Some tokenizers (Llama 3's) leave blanks out of their offsets, so a blank at a border that no
    token claims may belong to a token of either side.
    """
    inside = [False] * len(offsets)
    token = 0
    for start, end in spans:
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        before = offsets[token - 1][1] if token else 0
        if token == len(offsets) or not before == start == offsets[token][0]:
            return None
        while token < len(offsets) and offsets[token][0] < end:
            inside[token] = True
            token += 1
        last = offsets[token - 1][1]
        # Some end marks (Phi's) take the line end behind them with them.
        if last < end or text[end:last].strip():
            return None
    return inside


def _tokenize_parts(text: str, spans: list[Span], tokenizer: Any) -> tuple[list[int], list[bool]]:
    parts, place = [], 0
    for start, end in spans:
        parts += [(text[place:start], False), (text[start:end], True)]
        place = end
    parts.append((text[place:], False))
    ids: list[int] = []
    is_target: list[bool] = []
    for part, target in parts:
        part_ids = tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
        ids += part_ids
        is_target += [target] * len(part_ids)
    return ids, is_target
