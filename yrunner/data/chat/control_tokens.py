"""Keep control tokens that a text merely spells from being control tokens.

In `Say <|im_end|>.` the mark is text, which would end the turn. So before the template is rendered,
a break is put into each mark that the texts spell: every whole mark of the rendering is written by
the template. These get other names, the breaks go, and a twin of the tokenizer, which knows the
control tokens by these names only, tokenizes what the texts spell as any other text.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

from yrunner.data.chat.reply_text import is_thinking_mark
from yrunner.data.chat.template import PRIVATE_USE
from yrunner.data.conversation import Message

END_MARKS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Control tokens that people write by hand after a reply or a document, whatever the template."""

NAME = "\U000f8000{}\U000f8001"
"""The other name of a control token, by its number: no text contains it."""


@dataclass(frozen=True)
class Escaped:
    """Messages with breaks in the control tokens that they spell."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    broken_by: str
    """The character of the breaks."""
    without_end: bool
    """Whether an end mark written by hand was removed."""
    spells: bool
    """Whether there are breaks."""


class ControlTokens:
    """The special tokens of a tokenizer, where texts spell them.

    Other added tokens (`<think>` of Qwen3) are part of texts, and so are thinking marks in replies.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special} | {
            token for token in tokenizer.all_special_tokens if token in set(map(str, added))
        }
        # One character cannot be broken.
        self._marks = sorted(mark for mark in special if len(mark) > 1)
        self._pattern = re.compile(_any_of(self._marks) if self._marks else "(?!)")
        self._names = {mark: NAME.format(number) for number, mark in enumerate(self._marks)}
        # Such a token may match a text that spells it only after normalization.
        normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
        matches_normalized = any(token.special and token.normalized for token in added)
        self._normalizer = normalizer if matches_normalized else None

    def are_spelled_in(self, texts: Iterable[str]) -> bool:
        """Whether a text spells a control token."""
        text = "\0".join(texts)
        if self._pattern.search(text):
            return True
        if self._normalizer is None or not self._marks:
            return False
        shown = self._normalizer.normalize_str(text)
        return any(self._normalizer.normalize_str(mark) in shown for mark in self._marks)

    def escape(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        ends: Iterable[str] = (),
    ) -> Escaped | None:
        """The messages with breaks; None if they spell no control token.

        An end mark after the text of a reply or a document is removed, because the template or
        yrunner writes it: one of `ends`, the EOS token, or one of `END_MARKS`.
        """
        texts = list(texts_of(messages, tools))
        if not self.are_spelled_in(texts):
            return None
        used = set(chain.from_iterable(texts))
        broken_by = next(chr(code) for code in PRIVATE_USE if chr(code) not in used)
        eos = self._tokenizer.eos_token
        known = [mark for mark in {*ends, *END_MARKS, eos} if mark in self._names]
        at_end = re.compile(rf"(?:(?:{'|'.join(map(re.escape, known)) or '(?!)'})\s*)+\Z")
        plain = []
        without_end = False
        for message in messages:
            is_reply = message.role == "assistant"
            content = message.content
            if is_reply or message.role == "text":
                # A reply that is only a mark talks about it.
                content = at_end.sub("", content) if at_end.sub("", content).strip() else content
                without_end |= content != message.content
            plain.append(
                replace(
                    message,
                    content=self._broken(content, broken_by, spare_thinking=is_reply),
                    tool_calls=self._broken(message.tool_calls, broken_by),
                    extras=self._broken(message.extras, broken_by),
                )
            )
        plain_tools: tuple[Mapping[str, Any], ...] = self._broken(tuple(tools), broken_by)
        texts = list(texts_of(plain, plain_tools))
        # Nothing is broken in a text that spells a token only after normalization.
        spells = any(broken_by in text for text in texts) or self.are_spelled_in(texts)
        return Escaped(tuple(plain), plain_tools, broken_by, without_end, spells)

    def _broken(self, value: Any, by: str, *, spare_thinking: bool = False) -> Any:
        """The value with a break in every control token of its texts."""
        if isinstance(value, str):
            return self._pattern.sub(
                lambda mark: (
                    mark[0]
                    if spare_thinking and is_thinking_mark(mark[0])
                    else f"{mark[0][0]}{by}{mark[0][1:]}"
                ),
                value,
            )
        if isinstance(value, Mapping):
            return {self._broken(key, by): self._broken(item, by) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._broken(item, by) for item in value)
        return value

    def renamed(self, rendered: str, broken_by: str) -> str:
        """A rendering for the `twin`: control tokens under other names, and no breaks."""
        renamed = self._pattern.sub(lambda mark: self._names[mark[0]], rendered)
        # A template may write JSON in ASCII.
        return renamed.replace(broken_by, "").replace(json.dumps(broken_by)[1:-1], "")

    @cached_property
    def twin(self) -> Tokenizer:
        """A tokenizer that knows the control tokens by their other names only."""
        content = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in content["added_tokens"]:
            token["content"] = self._names.get(token["content"], token["content"])
        return Tokenizer.from_str(json.dumps(content))

    @cached_property
    def _own_ids(self) -> dict[int, int]:
        """The tokenizer's id of each added token, by the id in the twin."""
        ids = self._tokenizer.get_added_vocab()
        named = {self._names.get(token, token): token for token in ids}
        return {
            token_id: ids[token]
            for name, token in named.items()
            if (token_id := self.twin.token_to_id(name)) is not None
        }

    def own_ids(self, ids: Sequence[int]) -> tuple[list[int], bool]:
        """Ids of the twin as those of the tokenizer, and whether a text kept a control token.

        That happens if its vocabulary has the control token as an ordinary entry, too.
        """
        own = self._own_ids
        kept = any(token_id in self._control_ids and token_id not in own for token_id in ids)
        return [own.get(token_id, token_id) for token_id in ids], kept

    @cached_property
    def _control_ids(self) -> set[int]:
        added = self._tokenizer.get_added_vocab()
        return {added[mark] for mark in self._marks if mark in added} - {
            self._tokenizer.unk_token_id
        }


def control_tokens_of(tokenizer: Any) -> ControlTokens:
    """The control tokens of a tokenizer; its twin is built once."""
    return _control_tokens_of(tokenizer, len(tokenizer), *tokenizer.all_special_tokens)


@lru_cache(maxsize=4)
def _control_tokens_of(tokenizer: Any, *_state: Any) -> ControlTokens:
    return ControlTokens(tokenizer)


def texts_of(messages: Iterable[Message], tools: Iterable[Mapping[str, Any]] = ()) -> Iterator[str]:
    """Every text of the messages; calls and tools as JSON."""
    for message in messages:
        yield message.content
        if message.tool_calls:
            yield _as_json(message.tool_calls)
        if message.extras:
            yield from message.extras.values()
    yield from map(_as_json, tools)


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _any_of(words: Sequence[str]) -> str:
    """A pattern for the longest of these words, fast if there are thousands."""
    rests: dict[str, list[str]] = {}
    for word in words:
        rests.setdefault(word[:1], []).append(word[1:])
    may_end = rests.pop("", None) is not None
    found = "|".join(re.escape(first) + _any_of(rest) for first, rest in rests.items())
    return f"(?:{found}){'?' if may_end else ''}" if found else ""
