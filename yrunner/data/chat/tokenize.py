"""Texts that are cut into parts, to tokens: no token reaches over a cut.

The first part of a conversation is its prompt, so it gets exactly the tokens that it has at
inference, where the model writes the next part on its own.

Conversations to token ids and labels. This file alone decides which tokens are learned.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate, chain, compress, pairwise
from operator import itemgetter, not_
from typing import Any, Literal

from yrunner.data.chat.loss_mask import SpanFinder
from yrunner.data.chat.template import CharSpan, Chat, as_chat, render
from yrunner.data.conversation import (
    Conversation,
    FaultyRow,
    Message,
    TokenizedExample,
    TokenizedParts,
)
from yrunner.errors import ModelError

MARKERS = ("\n", "。", "\x00")
"""Texts to tokenize a part behind, so that it is no beginning of a text; one token or more."""

Tokens = tuple[list[int], list[CharSpan]]
"""Ids, and the characters that each stands for."""


class PartTokenizer:
    """Gives each part the tokens that it has behind the parts before it.

    Most tokenizers can take each part by itself. Some (Llama 2's, Phi-3's) write a blank before
    whatever text they get; there the whole text is tokenized and cut only where a token lies
    across a cut. Raises `ModelError` for a tokenizer that does not tell where its tokens stand.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} does not tell where in a text its tokens stand",
                remedy="use a model whose folder holds a tokenizer.json",
            )
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer.json may hold both; transformers, too, sets them anew for each of its calls.
        self._backend.no_padding()
        self._backend.no_truncation()
        apart = self._tokens("\n")[0] + self._tokens("a")[0]
        self._parts_stand_alone = self._tokens("\na")[0] == apart

    def tokenize(self, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """The ids of every part of every row."""
        if not self._parts_stand_alone:
            return [self._cut_where_needed(row, self._tokens) for row in rows]
        # Line ends behind turns and the like are the same in every row.
        parts = [part for part in dict.fromkeys(chain.from_iterable(rows)) if part]
        encodings = self._backend.encode_batch_fast(parts, add_special_tokens=False)
        ids = {part: encoding.ids for part, encoding in zip(parts, encodings, strict=True)}
        ids[""] = []
        return [[ids[part] for part in row] for row in rows]

    def _tokens(self, text: str) -> Tokens:
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _tokens_behind_a_text(self, text: str) -> Tokens:
        """The tokens of a text that is no beginning."""
        for marker in MARKERS:
            ids, offsets = self._tokens(marker + text)
            marker_ids, _ = self._tokens(marker)
            place = len(marker_ids)
            shifted = [(start - len(marker), end - len(marker)) for start, end in offsets[place:]]
            if ids[:place] == marker_ids and (not shifted or shifted[0][0] == 0):
                return ids[place:], shifted
        return self._tokens(text)

    def _cut_where_needed(
        self, parts: Sequence[str], tokens_of: Callable[[str], Tokens]
    ) -> list[list[int]]:
        """The ids of parts that are tokenized as one text but for the cuts that a token crosses."""
        ids, offsets = tokens_of("".join(parts))
        places = [_first_behind(offsets, cut) for cut in accumulate(map(len, parts))]
        cuts = [number for number, place in enumerate(places[:-1], start=1) if place is None]
        if cuts:
            found = self._cut_where_needed(parts[: cuts[0]], tokens_of)
            for start, end in pairwise([*cuts, len(parts)]):
                found += self._cut_where_needed(parts[start:end], self._tokens_behind_a_text)
            return found
        ends = [place for place in places[:-1] if place is not None] + [len(ids)]
        return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _first_behind(offsets: Sequence[CharSpan], cut: int) -> int | None:
    """The first token behind a cut; None where a token may lie across it.

    Blanks that no token claims may belong to a token of either side.
    """
    place = bisect_left(offsets, cut, key=itemgetter(0))
    end = offsets[place - 1][1] if place else 0
    start = offsets[place][0] if place < len(offsets) else cut
    return place if end == cut == start else None


TargetChoice = Literal["assistant", "last_assistant", "all"]
"""What is learned: the replies; the last of them; or all, with the questions.

A turn that is marked as not learned is context whatever is chosen, and `last_assistant` is the last
of those that are learned.
"""

Parts = list[str]
"""A text cut at the borders of what is learned: context and target by turns, context first."""

IdsOfParts = list[list[int]]
Result = TokenizedParts | FaultyRow
Waiting = tuple[Sequence[Conversation], list[Parts | FaultyRow], Future[list[IdsOfParts]]]
"""A chunk, its parts, and the ids of those that are no faults."""

ROWS_AT_ONCE = 512
"""Enough to keep all cores busy with tokenizing, few enough to have the next ready in time."""


def tokenize_conversations(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    *,
    system: str | None = None,
    targets: TargetChoice = "assistant",
) -> list[TokenizedExample | FaultyRow]:
    """One example, or the reason why there is none, for each conversation, in order.

    `system` opens every conversation that has no system message of its own. Raises `ModelError`
    where the tokenizer or its chat template is of no use for any conversation.

    The tokens before a reply are those that the model gets at inference, when the same template
    writes a prompt of the messages before it, but for three cases. Some templates write a turn in
    another way once it is history (Qwen3 and DeepSeek leave out its thinking). Some end a prompt
    with words that they do not write before this reply (the `<think>` of DeepSeek-R1, or MiniMind's
    empty thinking block where the reply has thinking). And a reply that begins with a blank is cut
    off from the words of the template before it, as it was when it was written; a later prompt is
    one text, and may join the two in one token.
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
    """`tokenize_conversations` for one chunk after the other, in the short form.

    While a chunk is tokenized, which leaves Python free, the next one is taken and rendered.
    """
    cutter = _Cutter(tokenizer, system, targets)
    part_tokenizer = PartTokenizer(tokenizer)
    with ThreadPoolExecutor(1) as background:
        waiting: Waiting | None = None
        for chunk in chunks:
            cut = cutter.cut(chunk)
            texts = [parts for parts in cut if not isinstance(parts, FaultyRow)]
            future = background.submit(part_tokenizer.tokenize, texts)
            if waiting:
                yield _join(*waiting)
            waiting = chunk, cut, future
        if waiting:
            yield _join(*waiting)


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


class _Cutter:
    """Renders conversations and cuts their texts where learning begins and ends."""

    def __init__(self, tokenizer: Any, system: str | None, targets: TargetChoice) -> None:
        self._tokenizer, self._system, self._targets = tokenizer, system, targets

    def cut(self, conversations: Sequence[Conversation]) -> list[Parts | FaultyRow]:
        """The parts of each conversation's text, or why it has none."""
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
    def _finder(self) -> SpanFinder:
        return SpanFinder(self._tokenizer)

    def _chat(self, conversation: Conversation) -> Chat:
        messages = with_system(conversation.messages, self._system)
        as_text = self._finder.marks.arguments_as_text
        return as_chat(messages, conversation.tools, arguments_as_text=as_text)

    def _cut_document(self, content: str) -> Parts:
        begin, end = self._document_ends
        return ["", begin + content + end]

    @cached_property
    def _document_ends(self) -> tuple[str, str]:
        """The mark that this tokenizer puts before a text by itself, if any, and the end mark.

        A document ends with the end mark, or the model would learn that texts never stop.
        """
        tokenizer = self._tokenizer
        ids = tokenizer("", add_special_tokens=True)["input_ids"]
        begins = bool(ids) and ids[0] == tokenizer.bos_token_id
        return tokenizer.bos_token if begins else "", tokenizer.eos_token or ""

    def _cut_turns(
        self, conversation: Conversation, chat: Chat, text: str | FaultyRow
    ) -> Parts | FaultyRow:
        if isinstance(text, FaultyRow):
            return text
        learned = [turn.learned for turn in conversation.messages if turn.role == "assistant"]
        try:
            spans = self._learned_spans(text, chat, learned)
        except FaultyRow as fault:
            return fault
        borders = [0, *chain.from_iterable(spans), len(text)]
        return [text[start:end] for start, end in pairwise(borders)]

    def _learned_spans(self, text: str, chat: Chat, learned: Sequence[bool]) -> list[CharSpan]:
        if self._targets == "all" and all(learned) and not chat.has_calls:
            return [(0, len(text))]
        spans = self._finder.find(text, chat)
        if self._targets == "all":
            return _between(list(compress(spans, map(not_, learned))), len(text))
        spans = list(compress(spans, learned))
        return spans[-1:] if self._targets == "last_assistant" else spans


def _between(spans: Sequence[CharSpan], length: int) -> list[CharSpan]:
    """What the spans leave of a text."""
    borders = [0, *chain.from_iterable(spans), length]
    return list(zip(borders[0::2], borders[1::2], strict=True))


def _join(
    conversations: Sequence[Conversation],
    cut: Sequence[Parts | FaultyRow],
    tokenized: Future[list[IdsOfParts]],
) -> list[Result]:
    ids_by_row = iter(tokenized.result())
    return [
        parts
        if isinstance(parts, FaultyRow)
        else TokenizedParts(next(ids_by_row), conversation.origin)
        for conversation, parts in zip(conversations, cut, strict=True)
    ]
