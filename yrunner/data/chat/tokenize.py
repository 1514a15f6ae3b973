"""Tokenize conversations and choose their targets; no other file decides which tokens these are."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, compress, pairwise
from operator import itemgetter, not_
from typing import Any, Literal

from yrunner.data.chat.control_tokens import (
    ControlTokens,
    Escaped,
    control_tokens_of,
    texts_of,
)
from yrunner.data.chat.loss_mask import SpanFinder
from yrunner.data.chat.reply_text import lost_text, opens_thinking, unbalanced_thinking
from yrunner.data.chat.template import (
    THINK_CLOSE,
    CharSpan,
    Chat,
    as_chat,
    find_thinking_keys,
    read_turn_marks,
    render,
)
from yrunner.data.conversation import (
    Conversation,
    FaultyRow,
    Message,
    Note,
    TokenizedExample,
    TokenizedParts,
)
from yrunner.errors import ModelError

TargetChoice = Literal["assistant", "last_assistant", "all"]
"""Targets are the replies, the last reply, or all tokens.

A reply with `learned` False is always context; `last_assistant` is the last of the others.
"""

Parts = list[str]
"""A text split into context and targets, alternating, context first."""


@dataclass(frozen=True)
class Cut:
    """A rendered conversation before it is tokenized."""

    parts: Parts
    notes: frozenset[Note] = frozenset()
    altered: FaultyRow | None = None
    """See `TokenizedParts`."""
    is_renamed: bool = False
    """Whether the parts are for the twin of the tokenizer, see control_tokens.py."""


IdsOfParts = list[list[int]]
Result = TokenizedParts | FaultyRow
TokenizedCut = tuple[IdsOfParts, frozenset[Note]]
Waiting = tuple[Sequence[Conversation], list[Cut | FaultyRow], Future[list[TokenizedCut]]]
"""A chunk, its cut texts or faults, and the future ids of the parts with notes."""

Tools = Sequence[Mapping[str, Any]]

Prompt = str | Sequence[int]
"""A prompt as text, or as ids if its messages spell control tokens."""

Tokens = tuple[list[int], list[CharSpan]]
"""Ids, and the characters of each."""

ROWS_AT_ONCE = 512
"""Enough to keep all cores busy, few enough that the next chunk is rendered meanwhile."""

MARKERS = ("\n", "。", "\x00")
"""Texts to put before a part, so that it is not tokenized as the beginning of a text."""


def tokenize_conversations(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    *,
    system: str | None = None,
    targets: TargetChoice = "assistant",
) -> list[TokenizedExample | FaultyRow]:
    """An example or a fault for each conversation, in order.

    `system` is added to every conversation without a system message. Raises `ModelError` if the
    tokenizer or its chat template cannot be used for any conversation.

    The tokens before a reply are those of the prompt at inference, with three exceptions. Some
    templates render a past turn differently (Qwen3 and DeepSeek drop its thinking). Some end a
    prompt with text that they do not write before this reply (the `<think>` of DeepSeek-R1, or
    MiniMind's empty thinking block if the reply has thinking). And the whitespace that a reply
    starts with is tokenized apart from the template's text before it, as when the model wrote it; a
    later prompt may join the two in one token.
    """
    chunks = (
        conversations[start : start + ROWS_AT_ONCE]
        for start in range(0, len(conversations), ROWS_AT_ONCE)
    )
    results = tokenize_chunks(chunks, tokenizer, system=system, targets=targets)
    return [
        result if isinstance(result, FaultyRow) else result.example()
        for result in chain.from_iterable(results)
    ]


def tokenize_chunks(
    chunks: Iterable[Sequence[Conversation]],
    tokenizer: Any,
    *,
    system: str | None = None,
    targets: TargetChoice = "assistant",
) -> Iterator[list[Result]]:
    """`tokenize_conversations` chunk by chunk, in the compact form.

    Tokenizing releases the GIL; meanwhile the next chunk is rendered.
    """
    cutter = _Cutter(tokenizer, system, targets)
    row_tokenizer = _RowTokenizer(tokenizer)
    with ThreadPoolExecutor(1) as background:
        waiting: Waiting | None = None
        for chunk in chunks:
            cut = cutter.cut(chunk)
            texts = [found for found in cut if isinstance(found, Cut)]
            future = background.submit(row_tokenizer.tokenize, texts)
            if waiting:
                yield _join(*waiting)
            waiting = chunk, cut, future
        if waiting:
            yield _join(*waiting)


def _join(
    conversations: Sequence[Conversation],
    cut: Sequence[Cut | FaultyRow],
    tokenized: Future[list[TokenizedCut]],
) -> list[Result]:
    rows = iter(tokenized.result())
    return [
        found if isinstance(found, FaultyRow) else _with_ids(conversation, found, *next(rows))
        for conversation, found in zip(conversations, cut, strict=True)
    ]


def _with_ids(
    conversation: Conversation, cut: Cut, ids: IdsOfParts, notes: frozenset[Note]
) -> TokenizedParts:
    return TokenizedParts(ids, conversation.origin, notes, cut.altered)


def prompt_text(
    messages: Sequence[Message], tokenizer: Any, system: str | None = None, tools: Tools = ()
) -> str:
    """The prompt of a conversation at inference.

    Raises `ModelError` if the chat template rejects the conversation.
    """
    thinks = any(THINK_CLOSE in message.content for message in messages)
    keys = find_thinking_keys(tokenizer) if thinks else None
    as_text = bool(tools) and read_turn_marks(tokenizer).arguments_as_text
    chat = as_chat(
        with_system(messages, system), tools, arguments_as_text=as_text, thinking_keys=keys
    )
    try:
        return render(chat, tokenizer, for_answer=True)
    except FaultyRow as fault:
        raise ModelError(
            str(fault), remedy="set model.chat_template to one that accepts such conversations"
        ) from fault


def prompt_of(
    messages: Sequence[Message], tokenizer: Any, system: str | None = None, tools: Tools = ()
) -> Prompt:
    """The prompt of a conversation at inference, as `tokenize_conversations` tokenizes it.

    Raises `ModelError` as `prompt_text` does.
    """
    messages = with_system(messages, system)
    control = control_tokens_of(tokenizer)
    escaped = control.escape(messages, tools)
    if escaped is not None:
        escaped = control.escape(messages, tools, read_turn_marks(tokenizer).ends)
    if escaped is None:
        return prompt_text(messages, tokenizer, tools=tools)
    text = prompt_text(escaped.messages, tokenizer, tools=escaped.tools)
    if not escaped.spells:
        return text
    renamed = control.renamed(text, escaped.broken_by)
    return control.own_ids(control.twin.encode(renamed, add_special_tokens=False).ids)[0]


def tokenize_prompts(
    chunks: Iterable[Sequence[Conversation]], tokenizer: Any, *, system: str | None = None
) -> Iterator[list[Result]]:
    """The prompt of each conversation, which has no reply yet, as its only part of context."""
    for chunk in chunks:
        yield [_tokenized_prompt(talk, tokenizer, system) for talk in chunk]


def _tokenized_prompt(talk: Conversation, tokenizer: Any, system: str | None) -> Result:
    try:
        prompt = prompt_of(talk.messages, tokenizer, system, talk.tools)
    except ModelError as error:
        if not isinstance(error.__cause__, FaultyRow):
            raise
        return error.__cause__
    if isinstance(prompt, str):
        prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return TokenizedParts([list(prompt)], talk.origin)


def tokens_without_end(
    messages: Sequence[Message], tokenizer: Any, system: str | None = None
) -> list[int]:
    """The tokens of a conversation whose reply was cut off: no end mark follows it."""
    prompt = prompt_text(messages[:-1], tokenizer, system)
    (parts,) = PartTokenizer(tokenizer).tokenize([[prompt, messages[-1].content]])
    return list(chain.from_iterable(parts))


def with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """The messages, with a system message in front if they have none."""
    if system is None or messages[0].role == "system":
        return tuple(messages)
    return (Message("system", system), *messages)


class _Cutter:
    """Renders conversations and splits their texts into context and targets."""

    def __init__(self, tokenizer: Any, system: str | None, targets: TargetChoice) -> None:
        self._tokenizer, self._system, self._targets = tokenizer, system, targets

    def cut(self, conversations: Sequence[Conversation]) -> list[Cut | FaultyRow]:
        """Each conversation, cut into parts, or its fault."""
        escaped = self._escape(conversations)
        if not escaped:
            return self._cut(conversations)
        plain = [
            replace(talk, messages=escaped[number].messages, tools=escaped[number].tools)
            if number in escaped
            else talk
            for number, talk in enumerate(conversations)
        ]
        return [
            self._renamed(found, escaped[number])
            if number in escaped and isinstance(found, Cut)
            else found
            for number, found in enumerate(self._cut(plain))
        ]

    def _escape(self, conversations: Sequence[Conversation]) -> dict[int, Escaped]:
        """The conversations that spell control tokens, by number, without them."""
        texts = chain.from_iterable(texts_of(talk.messages, talk.tools) for talk in conversations)
        if not self._control.are_spelled_in([*texts, self._system or ""]):
            return {}
        found = {
            number: self._control.escape(
                talk.messages if talk.is_text else with_system(talk.messages, self._system),
                talk.tools,
                () if talk.is_text else self._finder.marks.ends,
            )
            for number, talk in enumerate(conversations)
        }
        return {number: escaped for number, escaped in found.items() if escaped is not None}

    def _renamed(self, cut: Cut, escaped: Escaped) -> Cut:
        by_hand: frozenset[Note] = frozenset({"end_by_hand"} if escaped.without_end else ())
        notes = cut.notes | by_hand
        if not escaped.spells:
            return replace(cut, notes=notes)
        parts = [self._control.renamed(part, escaped.broken_by) for part in cut.parts]
        return replace(cut, parts=parts, notes=notes, is_renamed=True)

    def _cut(self, conversations: Sequence[Conversation]) -> list[Cut | FaultyRow]:
        chats = [self._chat(talk) for talk in conversations if not talk.is_text]
        texts = self._finder.render_all(chats) if chats else []
        rendered = zip(chats, texts, strict=True)
        return [
            self._cut_document(conversation.messages[0].content)
            if conversation.is_text
            else self._cut_turns(conversation, *next(rendered))
            for conversation in conversations
        ]

    @cached_property
    def _control(self) -> ControlTokens:
        return control_tokens_of(self._tokenizer)

    @cached_property
    def _finder(self) -> SpanFinder:
        return SpanFinder(self._tokenizer)

    def _chat(self, conversation: Conversation) -> Chat:
        messages = with_system(conversation.messages, self._system)
        marks = self._finder.marks
        return as_chat(
            messages,
            conversation.tools,
            arguments_as_text=marks.arguments_as_text,
            thinking_keys=marks.thinking_keys,
        )

    def _cut_document(self, content: str) -> Cut:
        begin, end = self._document_ends
        return Cut(["", begin + content + end])

    @cached_property
    def _document_ends(self) -> tuple[str, str]:
        """The BOS token, if this tokenizer adds it, and the EOS token.

        Without an EOS token the model would learn that documents never end.
        """
        tokenizer = self._tokenizer
        ids = tokenizer("", add_special_tokens=True)["input_ids"]
        begins = bool(ids) and ids[0] == tokenizer.bos_token_id
        return tokenizer.bos_token if begins else "", tokenizer.eos_token or ""

    def _cut_turns(
        self, conversation: Conversation, chat: Chat, text: str | FaultyRow
    ) -> Cut | FaultyRow:
        if isinstance(text, FaultyRow):
            return text
        learned = [turn.learned for turn in conversation.messages if turn.role == "assistant"]
        try:
            spans, shown = self._learned_spans(text, chat, learned)
        except FaultyRow as fault:
            return fault
        borders = [0, *chain.from_iterable(spans), len(text)]
        parts = [text[start:end] for start, end in pairwise(borders)]
        return Cut(parts, *self._compare(chat, list(compress(_replies(chat), learned)), shown))

    def _learned_spans(
        self, text: str, chat: Chat, learned: Sequence[bool]
    ) -> tuple[list[CharSpan], list[str]]:
        """The spans of the targets, and what the template writes of each learned reply."""
        if self._targets == "all" and all(learned) and not chat.has_calls:
            return [(0, len(text))], [text] * len(learned)
        spans = self._finder.find(text, chat)
        replies = list(compress(spans, learned))
        if self._targets == "last_assistant":
            replies = replies[-1:]
        shown = [text[start:end] for start, end in replies]
        if self._targets == "all":
            return _between(list(compress(spans, map(not_, learned))), len(text)), shown
        return replies, shown

    def _compare(
        self, chat: Chat, replies: Sequence[str], shown: Sequence[str]
    ) -> tuple[frozenset[Note], FaultyRow | None]:
        """The notes on learned replies, and the fault that `data.altered` decides about.

        `shown` is what the template writes of the last of these replies, in order.
        """
        notes: set[Note] = set()
        altered: FaultyRow | None = None
        last = len(shown) - 1
        for number, (reply, written) in enumerate(zip(replies[-len(shown) :], shown, strict=True)):
            is_last = number == last
            lost = lost_text(reply, written, is_last=is_last)
            unbalanced = unbalanced_thinking(reply, opened=self._is_opened, is_last=is_last)
            if lost:
                notes.add("altered")
            if unbalanced:
                notes.add("thinking")
            altered = (unbalanced if is_last else None) or lost or altered
        return frozenset(notes), altered

    @cached_property
    def _is_opened(self) -> bool:
        """Whether the prompt opens a thinking block."""
        return opens_thinking(self._finder.marks.openings.get("user", ""))


def _replies(chat: Chat) -> Iterator[str]:
    return (message["content"] for message in chat.messages if message["role"] == "assistant")


def _between(spans: Sequence[CharSpan], length: int) -> list[CharSpan]:
    """The spans of a text between the given ones."""
    borders = [0, *chain.from_iterable(spans), length]
    return list(zip(borders[0::2], borders[1::2], strict=True))


class _RowTokenizer:
    """Tokenizes rows with the tokenizer, or with its twin if they spell control tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._parts = PartTokenizer(tokenizer)

    def tokenize(self, cuts: Sequence[Cut]) -> list[TokenizedCut]:
        """The ids of each part of each row, and notes on the row."""
        plain = iter(self._parts.tokenize([cut.parts for cut in cuts if not cut.is_renamed]))
        renamed = [cut.parts for cut in cuts if cut.is_renamed]
        others = iter(self._renamed_parts.tokenize(renamed) if renamed else ())
        return [
            self._own(next(others), cut.notes) if cut.is_renamed else (next(plain), cut.notes)
            for cut in cuts
        ]

    def _own(self, parts: IdsOfParts, notes: frozenset[Note]) -> TokenizedCut:
        control = control_tokens_of(self._tokenizer)
        found = [control.own_ids(ids) for ids in parts]
        note: Note = "spelled_kept" if any(kept for _, kept in found) else "spelled_plain"
        return [ids for ids, _ in found], notes | {note}

    @cached_property
    def _renamed_parts(self) -> "PartTokenizer":
        return PartTokenizer(self._tokenizer, control_tokens_of(self._tokenizer).twin)


class PartTokenizer:
    """Tokenizes texts that are cut into parts; no token crosses a cut.

    The first part of a conversation is its prompt, which so has the same tokens as at inference,
    where the model itself writes the next part.

    Most tokenizers tokenize each part alone. Some (Llama 2's, Phi-3's) insert a space at the start
    of a text; these get the whole text, cut only where a token would cross a cut. Raises
    `ModelError` for a tokenizer without character offsets. `backend` takes the place of the
    tokenizer's own.
    """

    def __init__(self, tokenizer: Any, backend: Any = None) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} returns no character offsets",
                remedy="use a model whose folder has a tokenizer.json",
            )
        self._backend = backend or tokenizer.backend_tokenizer
        # tokenizer.json may set both; transformers, too, resets them on each call.
        self._backend.no_padding()
        self._backend.no_truncation()
        apart = self._tokens("\n")[0] + self._tokens("a")[0]
        self._parts_stand_alone = self._tokens("\na")[0] == apart

    def tokenize(self, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """The ids of each part of each row."""
        if not self._parts_stand_alone:
            return [self._cut_where_needed(row, self._tokens) for row in rows]
        # Parts such as the line end after a turn are the same in every row.
        parts = [part for part in dict.fromkeys(chain.from_iterable(rows)) if part]
        encodings = self._backend.encode_batch_fast(parts, add_special_tokens=False)
        ids = {part: encoding.ids for part, encoding in zip(parts, encodings, strict=True)}
        ids[""] = []
        return [[ids[part] for part in row] for row in rows]

    def _tokens(self, text: str) -> Tokens:
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _tokens_after_text(self, text: str) -> Tokens:
        """The tokens of a text that follows another one."""
        for marker in MARKERS:
            ids, offsets = self._tokens(marker + text)
            marker_ids, _ = self._tokens(marker)
            first = len(marker_ids)
            shifted = [(start - len(marker), end - len(marker)) for start, end in offsets[first:]]
            if ids[:first] == marker_ids and (not shifted or shifted[0][0] == 0):
                return ids[first:], shifted
        return self._tokens(text)

    def _cut_where_needed(
        self, parts: Sequence[str], tokens_of: Callable[[str], Tokens]
    ) -> list[list[int]]:
        """The ids of parts that are tokenized as one text, cut where a token would cross a cut."""
        ids, offsets = tokens_of("".join(parts))
        firsts = [_first_after(offsets, cut) for cut in accumulate(map(len, parts))]
        cuts = [number for number, first in enumerate(firsts[:-1], start=1) if first is None]
        if cuts:
            found = self._cut_where_needed(parts[: cuts[0]], tokens_of)
            for start, end in pairwise([*cuts, len(parts)]):
                found += self._cut_where_needed(parts[start:end], self._tokens_after_text)
            return found
        ends = [first for first in firsts[:-1] if first is not None] + [len(ids)]
        return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _first_after(offsets: Sequence[CharSpan], cut: int) -> int | None:
    """The first token after a cut; None if a token may cross it.

    Whitespace outside all offsets may belong to the token on either side.
    """
    index = bisect_left(offsets, cut, key=itemgetter(0))
    end = offsets[index - 1][1] if index else 0
    start = offsets[index][0] if index < len(offsets) else cut
    return index if end == cut == start else None
