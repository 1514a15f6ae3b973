"""What stands out among sound rows: doubles, contradictions, leaks into validation, damage."""

# E = examples of all files

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from json import dumps

import numpy as np

from yrunner.data.conversation import Conversation, Message
from yrunner.data.store import Column, Examples, Flags, Traits
from yrunner.errors import Origin

SHOWN_PLACES = 5

REPLACEMENT, CONTROL = 1, 2
REPLACEMENT_CHARACTER = "\ufffd"
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

SCRIPTS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "Latin": ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F)),
    "Chinese": ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x20000, 0x323AF)),
    "Kana": ((0x3040, 0x30FF),),
    "Hangul": ((0xAC00, 0xD7A3),),
    "Cyrillic": ((0x400, 0x52F),),
    "Arabic": ((0x600, 0x6FF),),
    "digits": ((0x30, 0x39),),
}
"""First and last code point of the letters that are counted, by script."""


@dataclass(frozen=True)
class Finding:
    """Something that a person may want to look at; the rows are learned from all the same."""

    what: str
    count: int
    places: tuple[Origin, ...]
    """The first of them."""


def traits_of(conversation: Conversation, part: int = 0) -> Traits:
    """What is kept of a conversation, or of a part of a long document, to find it again."""
    *before, last = conversation.messages
    hashed = blake2b("".join(map(_written, before)).encode(), digest_size=8)
    if conversation.tools:
        hashed.update(dumps(conversation.tools, sort_keys=True).encode())
    prompt = int.from_bytes(hashed.digest(), "little")
    hashed.update(f"{_written(last)}{part or ''}".encode())
    content = int.from_bytes(hashed.digest(), "little")
    texts = [message.content for message in conversation.messages]
    oddities = REPLACEMENT * any(REPLACEMENT_CHARACTER in text for text in texts)
    oddities |= CONTROL * any(CONTROL_CHARACTERS.search(text) is not None for text in texts)
    return Traits(content, content if conversation.is_text else prompt, oddities)


def _written(message: Message) -> str:
    calls = dumps(message.tool_calls, sort_keys=True) if message.tool_calls else ""
    return f"\0{message.role}\0{message.content}\0{calls}"


def count_scripts(texts: list[str]) -> dict[str, int]:
    """Letters of each script in the texts together, and digits."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    # Only the blocks that occur are compared: a text is mostly of one script.
    counts = np.bincount(codes) if len(codes) else np.zeros(1, np.int64)
    return {
        script: int(sum(counts[first : last + 1].sum() for first, last in ranges))
        for script, ranges in SCRIPTS.items()
    }


def find(train: Examples, validation: Examples) -> list[Finding]:
    """Everything that stands out, as far as it occurs."""
    return [finding for finding in _all_findings(train, validation) if finding.count]


def _all_findings(train: Examples, validation: Examples) -> Iterator[Finding]:
    contents_E, prompts_E = train.column("contents"), train.column("prompts")
    repeated_E = _repeated(contents_E)
    yield _finding("exact duplicates in train", train, repeated_E)
    yield _finding("conflicting answers to one prompt", train, _in_conflict(contents_E, prompts_E))
    both_E = np.isin(validation.column("contents"), contents_E)
    yield _finding("validation rows that stand in train too", validation, both_E)
    for name, examples in (("train", train), ("validation", validation)):
        oddities_E = examples.column("oddities")
        yield _finding(
            f"replacement characters (\ufffd) in {name}", examples, oddities_E & REPLACEMENT != 0
        )
        yield _finding(f"control characters in {name}", examples, oddities_E & CONTROL != 0)


def _finding(what: str, examples: Examples, here_E: Flags) -> Finding:
    places = np.flatnonzero(here_E)
    shown = tuple(examples.origin(int(place)) for place in places[:SHOWN_PLACES])
    return Finding(what, len(places), shown)


def _repeated(contents_E: Column) -> Flags:
    """True for every row that an earlier one equals."""
    _, first = np.unique(contents_E, return_index=True)
    repeated_E = np.ones(len(contents_E), bool)
    repeated_E[first] = False
    return repeated_E


def _in_conflict(contents_E: Column, prompts_E: Column) -> Flags:
    """True for every row whose prompt has another answer elsewhere."""
    pairs = np.unique(np.stack([prompts_E, contents_E], axis=1), axis=0)
    prompts, num_answers = np.unique(pairs[:, 0], return_counts=True)
    return np.isin(prompts_E, prompts[num_answers > 1])
