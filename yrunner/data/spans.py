"""Find what the assistant says in a rendered conversation, and where it ends its turn.

The chat template decides what is put around a reply, so it is asked twice: once with the real
replies, once with marks in their place that no text can contain. Between the marks stands what the
template itself writes; the real rendering must consist of exactly these pieces with the replies
between them. A reply can therefore hold anything, also words of the template, and it is never
assumed that the beginning of a conversation renders to the beginning of the text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from yrunner.data.conversation import FaultyRow, Message
from yrunner.errors import ModelError

Span = tuple[int, int]
"""First character of a piece of text, and the one after its last."""
Chat = Sequence[dict[str, str]]

GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
PRIVATE_USE = range(0xF0000, 0xFFFFE)
"""Characters that Unicode gives no meaning."""

# A template calls methods on what it is given, and Jinja passes their TypeError on.
TEMPLATE_ERRORS = (TemplateError, TypeError)


@dataclass(frozen=True)
class TurnMarks:
    """What a tokenizer and its chat template put around every reply."""

    opening: str | None
    """What follows a question where the model is to go on; None where that cannot be seen."""
    ends: tuple[str, ...]
    """The special tokens, the longest first: any of them may end a turn."""
    ends_are_marked: bool
    """Whether the template's own `{% generation %}` marks hold the end mark too."""


def read_turn_marks(tokenizer: Any) -> TurnMarks:
    """Ask the chat template for its marks. Raises `ModelError` where there is no template."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = {token for token in (*tokenizer.all_special_tokens, *added) if token}
    ends = tuple(sorted(special, key=len, reverse=True))
    unknown = chr(PRIVATE_USE[0])
    talk = [{"role": "user", "content": unknown}, {"role": "assistant", "content": unknown}]
    _, shown, opening = _render_or_nothing(talk[:1], tokenizer).rpartition(unknown)
    ends_are_marked = False
    if GENERATION_MARK.search(chat_template_of(tokenizer)):
        try:
            text, spans = _render_with_marks(talk, tokenizer)
        except FaultyRow as fault:
            raise ModelError(
                f"no conversation can be learned from: {fault}",
                remedy="set model.chat_template to another .jinja file",
            ) from fault
        ends_are_marked = all(text[start:end].rstrip().endswith(ends) for start, end in spans)
    return TurnMarks(opening if shown else None, ends, ends_are_marked)


def _render_or_nothing(chat: Chat, tokenizer: Any) -> str:
    try:
        return render(chat, tokenizer, for_answer=True)
    except FaultyRow:
        return ""


def render_with_spans(
    messages: Sequence[Message], tokenizer: Any, marks: TurnMarks
) -> tuple[str, list[Span]]:
    """Render a conversation; return its text and, per assistant turn, what the model must write.

    A span begins where the prompt ends at inference and goes over the reply and the end mark. So
    it also holds what the template itself writes before a reply and the prompt does not: the blank
    of ` reply</s>`, the opening of a thinking block, or the whole of an empty one.

    Raises `FaultyRow` where the template refuses the conversation or shows a reply in a form that
    cannot be recognised, and `ModelError` where it puts no end mark behind a reply.
    """
    chat = as_chat(messages)
    if GENERATION_MARK.search(chat_template_of(tokenizer)):
        text, spans = _render_with_marks(chat, tokenizer)
        if marks.ends_are_marked:
            return text, spans
    else:
        text = render(chat, tokenizer)
        spans = _spans_of_replies(text, chat, tokenizer, marks)
    return text, [_with_end_mark(text, span, marks) for span in spans]


def render(chat: Chat, tokenizer: Any, *, for_answer: bool = False) -> str:
    """The text of a conversation; `for_answer` opens the assistant's next turn at its end."""
    chat_template_of(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            list(chat), tokenize=False, add_generation_prompt=for_answer
        )
    except TEMPLATE_ERRORS as error:
        raise FaultyRow(f"the chat template refuses it: {error}") from error
    return str(text)


def as_chat(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages in the form that chat templates read."""
    return [{"role": message.role, "content": message.content} for message in messages]


def chat_template_of(tokenizer: Any) -> str:
    """The template for conversations without tools. Raises `ModelError` where there is none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ModelError(
            "the tokenizer has no chat template",
            remedy="set model.chat_template to a .jinja file",
        )
    return str(template)


def _render_with_marks(chat: Chat, tokenizer: Any) -> tuple[str, list[Span]]:
    """Use the template's own `{% generation %}` marks."""
    try:
        texts, spans = render_jinja_template(
            conversations=[list(chat)],
            chat_template=chat_template_of(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except TEMPLATE_ERRORS as error:
        raise FaultyRow(f"the chat template refuses it: {error}") from error
    num_replies = sum(message["role"] == "assistant" for message in chat)
    if len(spans[0]) != num_replies:
        raise FaultyRow(
            f"the chat template marks {len(spans[0])} pieces as generation, but the replies are "
            f"{num_replies}"
        )
    return texts[0], [(start, end) for start, end in spans[0]]


def _spans_of_replies(text: str, chat: Chat, tokenizer: Any, marks: TurnMarks) -> list[Span]:
    """Spans of the replies without their end marks."""
    mark = _unused_mark(chat)
    for split_thinking in (False, True):
        masked, forms = _mask_replies(chat, mark, split_thinking)
        pieces = re.split(f"({mark}[0-9]+[ra]{mark})", render(masked, tokenizer))
        places = _match_pieces(text, pieces, forms)
        if places is not None:
            return _join_turns(chat, pieces, places, mark, marks)
    raise FaultyRow("the chat template changes a reply so that it cannot be found again")


def _match_pieces(
    text: str, pieces: Sequence[str], forms: dict[str, list[str]]
) -> list[Span] | None:
    """Where the text stands for each mark, in order; None where the pieces do not fit the text.

    `pieces` are the template's and the marks by turns, `forms` what each mark may stand for.
    """
    place = len(pieces[0])
    fits = text.startswith(pieces[0])
    found: list[Span] = []
    for key, after in zip(pieces[1::2], pieces[2::2], strict=True):
        shown = next((it for it in forms[key] if text.startswith(it + after, place)), None)
        if shown is None:
            return None
        found.append((place, place + len(shown)))
        place += len(shown) + len(after)
    # A mark that is missing stands for a reply that was left out.
    answers = [key for key in forms if key[-2] == "a"]
    fits &= [key for key in pieces[1::2] if key[-2] == "a"] == answers
    return found if fits and place == len(text) else None


def _join_turns(
    chat: Chat, pieces: Sequence[str], places: Sequence[Span], mark: str, marks: TurnMarks
) -> list[Span]:
    """One span per turn: thinking and reply together, from where the prompt ends."""
    spans: dict[int, Span] = {}
    for before, key, (start, end) in zip(pieces[0::2], pieces[1::2], places, strict=False):
        turn = int(key.strip(mark)[:-1])
        if turn not in spans:
            start -= _length_after_prompt(before, chat[turn - 1]["content"], marks.opening)
        spans[turn] = (spans.get(turn, (start, end))[0], end)
    return list(spans.values())


def _length_after_prompt(before: str, question: str, opening: str | None) -> int:
    """Characters that the template writes between the end of the prompt and the reply."""
    if opening is None:
        return 0
    for shown in _trimmings(question):
        place = before.rfind(shown + opening)
        if place >= 0:
            return len(before) - place - len(shown + opening)
    return 0


def _unused_mark(chat: Chat) -> str:
    """A character that no message contains."""
    used = set(chain.from_iterable(message["content"] for message in chat))
    return next(chr(code) for code in PRIVATE_USE if chr(code) not in used)


def _mask_replies(
    chat: Chat, mark: str, split_thinking: bool
) -> tuple[list[dict[str, str]], dict[str, list[str]]]:
    """Put marks for the replies; return with them the forms that each reply may be shown in.

    Templates trim replies, and those of thinking models take the thinking apart, show it anew, or
    leave it out in earlier turns; `split_thinking` gives it a mark of its own.
    """
    masked: list[dict[str, str]] = []
    forms: dict[str, list[str]] = {}
    for turn, message in enumerate(chat):
        if message["role"] != "assistant":
            masked.append(message)
            continue
        content = message["content"]
        thinking, close, _ = content.partition(THINK_CLOSE)
        answer = content.rpartition(THINK_CLOSE)[2]
        reply_key, thinking_key = f"{mark}{turn}a{mark}", f"{mark}{turn}r{mark}"
        shown = reply_key
        if split_thinking and close:
            shown = f"{THINK_OPEN}\n{thinking_key}\n{THINK_CLOSE}\n\n{reply_key}"
            forms[thinking_key] = _trimmings(thinking.rpartition(THINK_OPEN)[2])
            forms[reply_key] = _trimmings(answer)
        else:
            forms[reply_key] = _trimmings(content) + (_trimmings(answer) if close else [])
        masked.append({"role": "assistant", "content": shown})
    return masked, forms


def _trimmings(text: str) -> list[str]:
    """The forms that a template may give a text, the longest first."""
    forms = {text, text.strip(), text.lstrip(), text.rstrip()}
    forms |= {text.strip("\n"), text.lstrip("\n"), text.rstrip("\n")}
    return sorted(forms, key=lambda form: (-len(form), form))


def _with_end_mark(text: str, span: Span, marks: TurnMarks) -> Span:
    """Stretch a span over the special token that ends the turn: it has to be learned, too."""
    start, end = span
    rest = text[end:]
    after = rest.lstrip()
    end_mark = next((mark for mark in marks.ends if after.startswith(mark)), None)
    if end_mark is None:
        raise ModelError(
            "the chat template puts no end mark behind a reply, so a model would never learn to "
            "stop",
            remedy="set model.chat_template to a .jinja file that ends each turn with a special "
            "token",
        )
    return start, end + len(rest) - len(after) + len(end_mark)
