"""Find the replies in a rendered conversation, each with its end-of-turn token: the loss mask.

A chat is rendered twice: once as it is, once with every text replaced by a key that no text
contains. The second rendering shows what the template itself writes; the first must consist of
exactly these pieces, with the texts between them. So a reply may contain anything, even what the
template writes, and the beginning of a conversation need not render to the beginning of the text.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from yrunner.data.chat.template import (
    PRIVATE_USE,
    THINK_CLOSE,
    THINK_OPEN,
    CharSpan,
    Chat,
    TurnMarks,
    marks_generation,
    read_turn_marks,
    render,
    render_all,
    render_or_fault,
    render_with_generation,
    unused_mark,
)
from yrunner.data.conversation import FaultyRow
from yrunner.errors import ModelError

KINDS = REPLY, THINKING, OTHER = "+-/"
"""What a key replaces. Not letters: a template may change their case."""

STAND_IN = chr(PRIVATE_USE[1])


@dataclass(frozen=True)
class Turn:
    """How far the span of a reply extends beyond its content, in characters."""

    number: int
    before: int
    after: int


@dataclass(frozen=True)
class Skeleton:
    """What the template writes around the contents of any conversation with the same roles."""

    pieces: tuple[str, ...]
    turns: tuple[Turn, ...]

    def spans(self, text: str, chat: Chat) -> list[CharSpan] | None:
        """The spans of the replies in the rendering of a chat; None if it has other pieces."""
        contents = [message["content"] for message in chat.messages]
        if not all(content.strip() for content in contents):
            return None  # a template may omit an empty message and what is around it
        if any(thinks(chat.messages[turn.number]) for turn in self.turns):
            return None
        places = match_pieces(text, self.pieces, [trimmings(content) for content in contents])
        if places is None:
            return None
        return [
            (places[turn.number][0] - turn.before, places[turn.number][1] + turn.after)
            for turn in self.turns
        ]


class SpanFinder:
    """Renders conversations with one template, and finds the spans of their replies.

    What a template writes depends on the roles, rarely on the contents. So it is learned once per
    sequence of roles, from a conversation of placeholders; a rendering with the same pieces has its
    replies between them. Any other one takes the slow path of `find_spans`, which renders it again.
    Raises `ModelError` if the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.marks = read_turn_marks(tokenizer)
        self._skeletons: dict[tuple[str, ...], Skeleton | FaultyRow | None] = {}

    def render_all(self, chats: Sequence[Chat]) -> list[str | FaultyRow]:
        """The text of each chat, or its fault."""
        plain = [chat for chat in chats if not chat.tools]
        texts = iter(render_all(plain, self._tokenizer))
        found = (self._render_with_tools(chat) if chat.tools else next(texts) for chat in chats)
        return [
            text if isinstance(text, FaultyRow) else closed(text, chat, self.marks)
            for text, chat in zip(found, chats, strict=True)
        ]

    def find(self, text: str, chat: Chat) -> list[CharSpan]:
        """`find_spans`, mostly without rendering again."""
        if not chat.tools and not chat.has_calls:
            skeleton = self._skeleton(chat.roles)
            spans = skeleton.spans(text, chat) if skeleton else None
            if spans is not None:
                return spans
        try:
            return find_spans(text, chat, self._tokenizer, self.marks)
        except FaultyRow as fault:
            spans = _find_altered(text, chat, self._tokenizer, self.marks)
            if spans is None:
                raise fault
            return spans

    def _render_with_tools(self, chat: Chat) -> str | FaultyRow:
        if not self.marks.shows_tools:
            return FaultyRow("the chat template does not render tools", "template")
        return render_or_fault(chat, self._tokenizer)

    def _skeleton(self, roles: tuple[str, ...]) -> Skeleton | None:
        if roles not in self._skeletons:
            try:
                skeleton: Skeleton | FaultyRow | None = _learn_skeleton(
                    roles, self._tokenizer, self.marks
                )
            except FaultyRow as fault:
                skeleton = fault
            self._skeletons[roles] = skeleton
        known = self._skeletons[roles]
        if isinstance(known, FaultyRow):
            raise FaultyRow(str(known), known.kind)
        return known


def _learn_skeleton(roles: Sequence[str], tokenizer: Any, marks: TurnMarks) -> Skeleton | None:
    """The skeleton for these roles, if any. Raises `FaultyRow` if a message would be omitted."""
    stand_ins = [f"{STAND_IN}{number}{STAND_IN}" for number in range(len(roles))]
    chat = Chat(
        [{"role": role, "content": content} for role, content in zip(roles, stand_ins, strict=True)]
    )
    try:
        text, spans = render_with_spans(chat, tokenizer, marks)
    except FaultyRow:
        return None
    for role, stand_in in zip(roles, stand_ins, strict=True):
        if stand_in not in text:
            raise left_out(role)
    pieces, rest = [], text
    for stand_in in stand_ins:
        piece, found, rest = rest.partition(stand_in)
        if not found:
            return None  # another order
        pieces.append(piece)
    pieces.append(rest)
    if STAND_IN in "".join(pieces):
        return None  # a content appears twice
    places = match_pieces(text, pieces, [[stand_in] for stand_in in stand_ins])
    assert places is not None, "the text consists of its own pieces"
    replies = [number for number, role in enumerate(roles) if role == "assistant"]
    turns = [
        Turn(number, places[number][0] - start, end - places[number][1])
        for number, (start, end) in zip(replies, spans, strict=True)
    ]
    return Skeleton(tuple(pieces), tuple(turns))


def render_with_spans(chat: Chat, tokenizer: Any, marks: TurnMarks) -> tuple[str, list[CharSpan]]:
    """Render a conversation; return its text and what the model must write in each reply.

    A span starts where the prompt ends at inference, and covers the reply, its calls and the
    end-of-turn token. It includes what the template writes before a reply but not in a prompt: the
    space of ` reply</s>`, the start of a thinking block, or an empty one.

    Raises `FaultyRow` if the template rejects the conversation or changes a text beyond
    recognition, and `ModelError` if it writes no end-of-turn token.
    """
    text = render_closed(chat, tokenizer, marks)
    return text, find_spans(text, chat, tokenizer, marks)


def render_closed(chat: Chat, tokenizer: Any, marks: TurnMarks) -> str:
    """The text of a chat, with the end of its last reply."""
    return closed(render(chat, tokenizer), chat, marks)


def closed(text: str, chat: Chat, marks: TurnMarks) -> str:
    """The rendering of a chat, with `TurnMarks.closing` after its last reply."""
    return text + marks.closing if chat.roles[-1] == "assistant" else text


def find_spans(text: str, chat: Chat, tokenizer: Any, marks: TurnMarks) -> list[CharSpan]:
    """What the model must write in each reply of `text`, the rendering of `chat`."""
    if marks_generation(chat, tokenizer):
        _, spans = render_with_generation(chat, tokenizer)
        spans = _behind_prompts(text, spans, chat, marks)
        if not marks.ends_are_marked:
            spans = [(start, behind_end_mark(text, end, marks)) for start, end in spans]
    else:
        spans = _spans_between_marks(text, chat, tokenizer, marks)
    _check_calls_are_shown(text, spans, chat)
    _check_words_are_shown(text, spans, chat)
    _check_thinking_is_shown(text, spans, chat)
    return [(start, behind_swallowed(text, end, marks)) for start, end in spans]


def _behind_prompts(
    text: str, spans: Sequence[CharSpan], chat: Chat, marks: TurnMarks
) -> list[CharSpan]:
    """The spans without the end of the prompt, with which a `{% generation %}` block may begin."""
    turns = [turn for turn, role in enumerate(chat.roles) if role == "assistant"]
    return [
        (_behind_prompt(text, start, chat.roles[turn - 1], marks) if turn else start, end)
        for turn, (start, end) in zip(turns, spans, strict=True)
    ]


def _behind_prompt(text: str, start: int, asked_by: str, marks: TurnMarks) -> int:
    known = [texts[asked_by] for texts in (marks.openings, marks.headers) if asked_by in texts]
    if text.endswith(tuple(known), 0, start):
        return start
    for opening in known:
        for cut in range(len(opening) - 1, -1, -1):
            if text.endswith(opening[:cut], 0, start) and text.startswith(opening[cut:], start):
                return start + len(opening) - cut
    return start


def _spans_between_marks(text: str, chat: Chat, tokenizer: Any, marks: TurnMarks) -> list[CharSpan]:
    fault = not_found()
    for masked in _maskings(chat):
        try:
            places = _places(text, masked, tokenizer, marks)
            return _join_turns(text, places, chat, marks)
        except FaultyRow as error:
            fault = error
    raise fault


def _find_altered(text: str, chat: Chat, tokenizer: Any, marks: TurnMarks) -> list[CharSpan] | None:
    """The spans of replies that the template changes, if special tokens follow each of them."""
    if chat.has_calls:
        return None
    masked = _mask(chat, split_thinking=False, mask_all=False)
    try:
        rendered = render_closed(masked.chat, tokenizer, marks)
        pieces, keys = _split_at_keys(rendered, masked)
        if keys != list(masked.forms) or not text.startswith(pieces[0]):
            return None
        turns, place, slots = [int(key[1:-2]) for key in keys], len(pieces[0]), []
        for turn, before, after in zip(turns, pieces, pieces[1:], strict=False):
            end = text.find(after, place)
            if end < 0 or not any(token in after for token in marks.special):
                return None
            slots.append(_Slot(turn, REPLY, -1, before, (place, end)))
            place = end + len(after)
        return _join_turns(text, slots, chat, marks) if place == len(text) else None
    except FaultyRow:
        return None


def _split_at_keys(rendered: str, masked: "_Masked") -> tuple[list[str], list[str]]:
    """The pieces between the keys, and the keys."""
    split = re.split(f"({masked.separator}[0-9]+[+/-]{masked.separator})", rendered)
    return split[0::2], split[1::2]


@dataclass(frozen=True)
class _Masked:
    """A chat with keys in place of texts. A key names its turn and what it replaces."""

    chat: Chat
    forms: dict[str, list[str]]
    """The texts that may replace each key, in the order of the turns."""
    separator: str


def _maskings(chat: Chat) -> Iterator[_Masked]:
    """Ways to put keys into a chat, to try in turn.

    First replace all texts; if that fails only the replies, because a template may read the
    questions. A call has no text to replace, and for an empty reply a template may write less than
    for a key: such turns keep their content, and are located by the keys around them. Templates of
    thinking models move, rewrite or drop the thinking, so it gets a separate key if needed.
    """
    for mask_all in (True,) if chat.has_calls else (True, False):
        for split_thinking in (False, True):
            yield _mask(chat, split_thinking=split_thinking, mask_all=mask_all)


def _mask(chat: Chat, *, split_thinking: bool, mask_all: bool) -> _Masked:
    separator = unused_mark(chat)
    masked: list[dict[str, Any]] = []
    forms: dict[str, list[str]] = {}
    for turn, message in enumerate(chat.messages):
        keys = [f"{separator}{turn}{kind}{separator}" for kind in KINDS]
        if message["role"] == "assistant":
            split = split_thinking and "thinking" not in message
            shown, turn_forms = _mask_reply(message["content"], keys, split, mask_all)
            if "thinking" in message:
                turn_forms[keys[1]] = trimmings(message["thinking"])
                message = {**message, "thinking": keys[1]}
        elif mask_all:
            shown, turn_forms = keys[2], {keys[2]: _forms(message)}
        else:
            shown, turn_forms = message["content"], {}
        masked.append({**message, "content": shown})
        forms |= turn_forms
    return _Masked(replace(chat, messages=masked), forms, separator)


def _mask_reply(
    content: str, keys: Sequence[str], split_thinking: bool, mask_all: bool
) -> tuple[str, dict[str, list[str]]]:
    """A reply with keys, and the forms of each key."""
    before, close, _ = content.partition(THINK_CLOSE)
    answer = content.rpartition(THINK_CLOSE)[2]
    thinking = before.rpartition(THINK_OPEN)[2] if close and split_thinking else ""
    reply_key, thinking_key, _ = keys
    keep_answer = mask_all and not answer.strip()
    if keep_answer and not thinking.strip():
        return content, {}
    shown_answer = answer if keep_answer else reply_key
    if not (close and split_thinking):
        return shown_answer, {reply_key: trimmings(content) + (trimmings(answer) if close else [])}
    forms = {thinking_key: trimmings(thinking)}
    if not keep_answer:
        forms[reply_key] = trimmings(answer)
    return f"{THINK_OPEN}\n{thinking_key}\n{THINK_CLOSE}\n\n{shown_answer}", forms


def _forms(message: dict[str, Any]) -> list[str]:
    """What a message other than a reply may look like; a tool's result may be quoted as JSON."""
    forms = trimmings(message["content"])
    if message["role"] == "tool":
        forms.append(json.dumps(message["content"], ensure_ascii=False)[1:-1])
    return forms


def thinks(reply: Mapping[str, Any]) -> bool:
    """Whether a reply has thinking, or seems so to a template."""
    return "thinking" in reply or any(
        mark in reply["content"] for mark in (THINK_OPEN, THINK_CLOSE)
    )


def trimmings(text: str) -> list[str]:
    """The text with whitespace stripped as a template may do it, the longest first."""
    core = text.strip()
    if core == text:
        return [text]
    forms = {text, core, text.lstrip(), text.rstrip()}
    forms |= {text.strip("\n"), text.lstrip("\n"), text.rstrip("\n")}
    return sorted(forms, key=lambda form: (-len(form), form))


def match_pieces(
    text: str, pieces: Sequence[str], forms: Sequence[Sequence[str]]
) -> list[CharSpan] | None:
    """The spans of the contents between the pieces of `text`; None if these do not match.

    `forms` lists what each content may look like; there is one more of the pieces.
    """
    if not text.startswith(pieces[0]):
        return None
    place = len(pieces[0])
    found: list[CharSpan] = []
    for allowed, after in zip(forms, pieces[1:], strict=True):
        shown = next((form for form in allowed if text.startswith(form + after, place)), None)
        if shown is None:
            return None
        found.append((place, place + len(shown)))
        place += len(shown) + len(after)
    return found if place == len(text) else None


@dataclass(frozen=True)
class _Slot:
    """Where the real text of a key is."""

    turn: int
    kind: str
    turn_before: int
    """The turn of the previous key; -1 for the first."""
    before: str
    """The text between the previous key and this one."""
    span: CharSpan


def _places(text: str, masked: _Masked, tokenizer: Any, marks: TurnMarks) -> list[_Slot]:
    """Where the texts of the keys are. Raises `FaultyRow` if the pieces around them differ."""
    rendered = render_closed(masked.chat, tokenizer, marks)
    pieces, keys = _split_at_keys(rendered, masked)
    for key, forms in masked.forms.items():
        if masked.chat.has_calls and key not in keys and key[-2] == OTHER and forms[0].strip():
            raise left_out(masked.chat.messages[int(key[1:-2])]["role"])
    # A missing key is a reply that the template omits.
    if [key for key in keys if key[-2] == REPLY] != [
        key for key in masked.forms if key[-2] == REPLY
    ]:
        raise not_found()
    spans = match_pieces(text, pieces, [masked.forms[key] for key in keys])
    if spans is None:
        raise not_found()
    turns, kinds = [int(key[1:-2]) for key in keys], [key[-2] for key in keys]
    places = zip(turns, kinds, [-1, *turns], pieces, spans, strict=False)
    return [_Slot(*place) for place in places]


def _join_turns(text: str, places: Sequence[_Slot], chat: Chat, marks: TurnMarks) -> list[CharSpan]:
    """The span of each reply, from the end of the prompt to after the end-of-turn token."""
    places_of: dict[int, list[_Slot]] = {turn: [] for turn in range(len(chat.messages))}
    for place in places:
        places_of[place.turn].append(place)
    limits = {turn: own[0].span[0] for turn, own in places_of.items() if own}
    limits[len(chat.messages)] = len(text)
    spans: list[CharSpan] = []
    for turn, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        own = places_of[turn]
        if own:
            end = own[-1].span[1]
            start = _start(text, end, own[0], chat, marks)
        else:
            start = end = _start_of_bare_turn(text, turn, places_of, chat, marks)
        if own and own[-1].kind == REPLY and "tool_calls" not in message:
            end = behind_end_mark(text, end, marks)
        elif turn + 1 in limits:
            ends = marks.ends_of_calls if "tool_calls" in message else marks.ends
            end = behind_last_end_mark(text, end, limits[turn + 1], ends)
        else:
            raise not_found()
        spans.append((start, end))
    return spans


def _start(text: str, reply_end: int, reply: _Slot, chat: Chat, marks: TurnMarks) -> int:
    """Where the prompt of a reply ends; if that is unknown, where the reply starts.

    A prompt that opens a thinking block may end inside the reply.
    """
    start, before = reply.span[0], reply.before
    question = chat.messages[reply.turn - 1]
    opening = marks.openings.get(question["role"]) if reply.turn else None
    if opening is None:
        return start
    if reply.turn_before == reply.turn - 1:
        place = start - len(before)
        end = place + len(opening)
        latest = reply_end if thinks(chat.messages[reply.turn]) else start
        return end if end <= latest and text.startswith(opening, place) else start
    for shown in trimmings(question["content"]):
        place = before.rfind(shown + opening)
        if place >= 0:
            return start - len(before) + place + len(shown + opening)
    return start


def _start_of_bare_turn(
    text: str, turn: int, places_of: Mapping[int, list[_Slot]], chat: Chat, marks: TurnMarks
) -> int:
    """Where the prompt of a reply without keys ends."""
    question = places_of.get(turn - 1)
    if not question:
        raise not_found()
    role, start = chat.messages[turn - 1]["role"], question[-1].span[1]
    for known in (marks.openings, marks.headers):
        if role in known and text.startswith(known[role], start):
            return start + len(known[role])
    raise not_found()


def behind_end_mark(text: str, place: int, marks: TurnMarks) -> int:
    """The end of the end-of-turn token after a reply, which ends at `place`.

    Raises `ModelError` if no special token follows.
    """
    place = _behind_blanks(text, place)
    end = next((token for token in marks.special if text.startswith(token, place)), None)
    if end is None:
        raise _no_end_mark()
    return place + len(end)


def behind_last_end_mark(text: str, start: int, limit: int, ends: Sequence[str]) -> int:
    """The end of the last end-of-turn token between `start` and the next turn's text at `limit`.

    Calls may contain special tokens, too, so only those in `ends` count. Raises `FaultyRow` if
    there is none here, and `ModelError` if there never is.
    """
    found = [place + len(end) for end in ends if (place := text.rfind(end, start, limit)) >= 0]
    if not found:
        raise not_found() if ends else _no_end_mark()
    return max(found)


def behind_swallowed(text: str, end: int, marks: TurnMarks) -> int:
    """The end of a span, after the whitespace that is part of its last token."""
    if marks.swallowing and text.endswith(marks.swallowing, 0, end):
        return _behind_blanks(text, end)
    return end


def _behind_blanks(text: str, place: int) -> int:
    while text[place : place + 1].isspace():
        place += 1
    return place


def _check_calls_are_shown(text: str, spans: Sequence[CharSpan], chat: Chat) -> None:
    turns = [message for message in chat.messages if message["role"] == "assistant"]
    for (start, end), message in zip(spans, turns, strict=True):
        shown = text[start:end].replace(message["content"].strip(), "", 1)
        shown = shown.replace(message.get("thinking", "").strip(), "", 1)
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in shown:
                raise FaultyRow("the chat template does not render tool_calls", "template")


def _check_words_are_shown(text: str, spans: Sequence[CharSpan], chat: Chat) -> None:
    """Refuse a turn without the words before its calls, which generation blocks may omit."""
    turns = [message for message in chat.messages if message["role"] == "assistant"]
    for (start, end), message in zip(spans, turns, strict=True):
        words = message["content"].rpartition(THINK_CLOSE)[2].strip()
        if "tool_calls" in message and words not in text[start:end]:
            raise not_found()


def _check_thinking_is_shown(text: str, spans: Sequence[CharSpan], chat: Chat) -> None:
    """Refuse a last reply without its thinking; that of earlier ones many templates omit."""
    thinking = chat.messages[-1].get("thinking", "").strip()
    if thinking and thinking not in text[slice(*spans[-1])]:
        raise FaultyRow("the chat template omits the thinking of the last reply", "template")


def left_out(role: str) -> FaultyRow:
    """The fault of a row that the template would render only in part."""
    return FaultyRow(f"the chat template omits a message with role {role}", "template")


def not_found() -> FaultyRow:
    """The fault of a row whose replies cannot be located."""
    return FaultyRow("the chat template changes a reply beyond recognition", "template")


def _no_end_mark() -> ModelError:
    return ModelError(
        "the chat template writes no end-of-turn token, so the model would never learn to stop",
        remedy="set model.chat_template to a .jinja file that ends each turn with a special token",
    )
