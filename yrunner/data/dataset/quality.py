"""Find possible faults among valid rows: duplicates, contradictions, leaks, damaged text."""

# E = examples of all files

# S = shingles of all examples, H = hash functions

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import groupby, pairwise
from json import dumps
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from yrunner.data.conversation import Conversation, Message, Note
from yrunner.data.dataset.examples import Column, Examples, Flags, StoredRows, Traits
from yrunner.errors import Origin

SHOWN_PLACES = 5

REPLACEMENT, CONTROL = 1, 2
NOTES: Mapping[Note, tuple[int, str, str]] = {
    "altered": (
        4,
        "replies whose text the chat template changes or removes",
        "set model.chat_template to one that keeps the text",
    ),
    "thinking": (8, "replies with unbalanced thinking marks", "fix the thinking marks"),
    "spelled_plain": (
        16,
        "control tokens spelled in texts (read as plain text)",
        "remove them if the rows were rendered before",
    ),
    "spelled_kept": (
        32,
        "control tokens spelled in texts (this tokenizer cannot read them as plain text)",
        "remove them",
    ),
    "end_by_hand": (
        64,
        "hand-written end marks (left out)",
        "",
    ),
    "one_end": (
        128,
        "pairs of which only one answer ends with a hand-written end mark",
        "write it behind both or neither: marks that this model does not use stay text",
    ),
    "one_cut": (
        256,
        "pairs of which only one answer was cut (the other loses its end mark, too)",
        "raise data.max_length",
    ),
}
"""Flag of each note, its finding and the remedy."""
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
"""Ranges of code points, by script; both ends are included."""


@dataclass(frozen=True)
class Finding:
    """Something worth a look; the rows are trained on all the same."""

    what: str
    count: int
    places: tuple[Origin, ...]
    """The first rows of this kind."""
    remedy: str = ""
    """What to do about these rows, if that is not obvious."""
    others: tuple[Origin, ...] = ()
    """The row that each of the first rows repeats or contradicts; empty for other findings."""


def traits_of(conversation: Conversation, part: int = 0, notes: Iterable[Note] = ()) -> Traits:
    """The traits of a conversation, or of one part of a split document."""
    messages = conversation.messages
    num_before = len(messages) - 1
    if conversation.is_desirable is not None:
        # Answers may have several turns, with the results of tools between them; blanks around
        # them make no difference.
        roles = [message.role for message in messages]
        num_before = len(roles) - roles[::-1].index("user")
        messages = tuple(replace(it, content=it.content.strip()) for it in messages)
    hashed = blake2b("".join(map(_written, messages[:num_before])).encode(), digest_size=8)
    if conversation.tools:
        hashed.update(dumps(conversation.tools, sort_keys=True).encode())
    prompt = int.from_bytes(hashed.digest(), "little")
    hashed.update(f"{''.join(map(_written, messages[num_before:]))}{part or ''}".encode())
    content = int.from_bytes(hashed.digest(), "little")
    texts = [message.content for message in conversation.messages]
    oddities = REPLACEMENT * any(REPLACEMENT_CHARACTER in text for text in texts)
    oddities |= CONTROL * any(CONTROL_CHARACTERS.search(text) is not None for text in texts)
    oddities |= sum(NOTES[note][0] for note in notes)
    rating = 0 if conversation.is_desirable is None else 2 * conversation.is_desirable - 1
    return Traits(content, content if conversation.is_text else prompt, oddities, rating)


def _written(message: Message) -> str:
    calls = dumps(message.tool_calls, sort_keys=True) if message.tool_calls else ""
    return f"\0{message.role}\0{message.content}\0{calls}"


def count_scripts(texts: list[str]) -> dict[str, int]:
    """Number of letters of each script in the texts, and of digits."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    counts = np.bincount(codes) if len(codes) else np.zeros(1, np.int64)
    return {
        script: int(sum(counts[first : last + 1].sum() for first, last in ranges))
        for script, ranges in SCRIPTS.items()
    }


def find(train: Examples, validation: Examples) -> list[Finding]:
    """Every kind of finding that occurs."""
    return [found for found in _all_findings(train, validation) if found.count]


def _all_findings(train: Examples, validation: Examples) -> Iterator[Finding]:
    contents_E, prompts_E = train.column("contents"), train.column("prompts")
    repeated_E = _repeated(contents_E)
    yield finding("exact duplicates in train", train, repeated_E)
    yield finding(
        "different answers to the same prompt", train, _in_conflict(contents_E, prompts_E)
    )
    both_E = np.isin(validation.column("contents"), contents_E)
    yield finding("validation rows that are also in train", validation, both_E)
    for name, examples in (("train", train), ("validation", validation)):
        yield from find_oddities(name, examples, examples.column("oddities"))


def find_oddities(name: str, rows: StoredRows[Any], oddities_E: Column) -> Iterator[Finding]:
    """What is odd about single rows, by the flags of each."""
    yield finding(f"replacement characters (\ufffd) in {name}", rows, oddities_E & REPLACEMENT != 0)
    yield finding(f"control characters in {name}", rows, oddities_E & CONTROL != 0)
    for flag, what, remedy in NOTES.values():
        yield finding(f"{what} in {name}", rows, oddities_E & flag != 0, remedy)


def finding(what: str, rows: StoredRows[Any], here_E: Flags, remedy: str = "") -> Finding:
    """The finding about the rows that are flagged."""
    places = np.flatnonzero(here_E)
    shown = tuple(rows.origin(int(place)) for place in places[:SHOWN_PLACES])
    return Finding(what, len(places), shown, remedy)


def _repeated(contents_E: Column) -> Flags:
    """True for every row that equals an earlier one."""
    _, first = np.unique(contents_E, return_index=True)
    repeated_E = np.ones(len(contents_E), bool)
    repeated_E[first] = False
    return repeated_E


def _in_conflict(contents_E: Column, prompts_E: Column) -> Flags:
    """True for every row whose prompt has a different answer elsewhere."""
    pairs = np.unique(np.stack([prompts_E, contents_E], axis=1), axis=0)
    prompts, num_answers = np.unique(pairs[:, 0], return_counts=True)
    return np.isin(prompts_E, prompts[num_answers > 1])


PairKind = Literal["conflict", "duplicate", "near"]

SHINGLE = 3
"""Consecutive tokens in a shingle."""
NUM_BANDS, BAND = 8, 8
"""Of 64 MinHashes, all 8 of a band must agree: this finds 99 % of the pairs with a similarity of
0.9, and 77 % of those with 0.8."""
LEAST_LIKENESS = 0.8
"""Jaccard similarity from which two rows are near duplicates."""

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class RowPair:
    """Two rows that duplicate or contradict each other."""

    kind: PairKind
    first: int
    """Index of the earlier row."""
    second: int
    likeness: float
    """Jaccard similarity of their shingles; 1 for exact duplicates."""


def find_pairs(examples: Examples) -> list[RowPair]:
    """Conflicts and exact duplicates, each paired with the first such row, then near duplicates.

    Near duplicates are sorted by similarity. They are found by MinHash, in time linear in the
    tokens: a few are missed, and in a large group not every row is paired with every other.
    """
    contents, prompts = (examples.column(name).tolist() for name in ("contents", "prompts"))
    start = count_common_start(examples)
    shingles = [_shingles(np.array(example.input_ids[start:])) for example in examples]
    pairs = [*_same_key("conflict", prompts, contents), *_same_key("duplicate", contents)]
    told = {(first, second) for _, first, second in pairs}
    first_of = {content: index for index, content in reversed([*enumerate(contents)])}
    rows = sorted(index for index in first_of.values() if len(shingles[index]))
    alike = [
        RowPair("near", first, second, likeness)
        for first, second in sorted(_candidates(rows, shingles) - told)
        if (likeness := _likeness(shingles[first], shingles[second])) >= LEAST_LIKENESS
    ]
    return [
        *(
            RowPair(kind, first, second, _likeness(shingles[first], shingles[second]))
            for kind, first, second in pairs
        ),
        *sorted(alike, key=lambda pair: -pair.likeness),
    ]


def count_common_start(examples: Examples) -> int:
    """Number of tokens that all examples start with, such as a system prompt."""
    common: list[int] = examples[0].input_ids if len(examples) else []
    for example in examples:
        # Most examples share all of it: then one comparison is enough.
        if example.input_ids[: len(common)] != common:
            both = zip(common, example.input_ids, strict=False)
            common = common[: next((n for n, (one, other) in enumerate(both) if one != other), 0)]
    return len(common)


def _same_key(
    kind: PairKind, keys: Sequence[int], contents: Sequence[int] | None = None
) -> Iterator[tuple[PairKind, int, int]]:
    """The first row of each key with every later one; given contents, one row per content."""
    first_of: dict[int, int] = {}
    met: set[tuple[int, int]] = set()
    for index, key in enumerate(keys):
        first = first_of.setdefault(key, index)
        if contents is not None:
            if (key, contents[index]) in met:
                continue
            met.add((key, contents[index]))
        if first != index:
            yield kind, first, index


def _shingles(ids: NDArray[Any]) -> Hashes:
    """The hashes of all shingles, unique and sorted."""
    if len(ids) < SHINGLE:
        return np.empty(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), SHINGLE)
    # The multiplication wraps around on purpose; the shift makes it more than a weighted sum.
    hashed = windows @ _odd_numbers(SHINGLE, seed=1)
    return np.unique(hashed ^ hashed >> np.uint64(29))


def _candidates(rows: Sequence[int], shingles: Sequence[Hashes]) -> set[tuple[int, int]]:
    """Pairs of rows with an equal band of MinHashes; each row with the previous one."""
    if not rows:
        return set()
    sizes = [len(shingles[row]) for row in rows]
    starts = np.cumsum([0, *sizes[:-1]])
    shingle_S = np.concatenate([shingles[row] for row in rows])
    odd_H = _odd_numbers(NUM_BANDS * BAND, seed=2)
    found = set()
    for band_H in np.split(odd_H, NUM_BANDS):
        smallest = [np.minimum.reduceat(shingle_S * odd, starts) for odd in band_H]
        keys = np.stack(smallest, axis=1) @ band_H
        order = np.argsort(keys, kind="stable").tolist()
        for _, group in groupby(order, keys.tolist().__getitem__):
            found |= {(rows[first], rows[second]) for first, second in pairwise(group)}
    return found


def _odd_numbers(count: int, seed: int) -> Hashes:
    random = np.random.default_rng(seed)
    return random.integers(0, 2**64, count, np.uint64, endpoint=False) | np.uint64(1)


def _likeness(left: Hashes, right: Hashes) -> float:
    """Jaccard similarity of two sets of shingles; 1 if both are empty."""
    num_shared = len(np.intersect1d(left, right, assume_unique=True))
    num_all = len(left) + len(right) - num_shared
    return num_shared / num_all if num_all else 1.0
