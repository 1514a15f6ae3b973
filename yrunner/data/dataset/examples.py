"""Tokenized examples in flat files: read from disk one by one, never all in memory."""

# E = examples, T = tokens of all examples

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from yrunner.data.conversation import (
    RatedExample,
    TokenizedExample,
    TokenizedPair,
    TokenizedParts,
)
from yrunner.errors import Origin
from yrunner.tokens import IGNORE_INDEX

TOKENS, COLUMNS = "tokens.bin", "columns.npz"
LINES = "lines.jsonl"
"""What prompts hold besides their tokens, each in a line."""

Column = NDArray[np.integer[Any]]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Traits:
    """Facts about an example besides its tokens."""

    content: int
    """64-bit hash of the conversation: equal for exact duplicates."""
    prompt: int
    """64-bit hash of everything before the last reply; for a document that of its content."""
    oddities: int
    """Flags of quality.py: what deserves a look, such as characters that hint at damage."""
    rating: int = 0
    """1 for the better answer of a pair or one marked as good, -1 for the other, 0 without."""
    shared: int = 0
    """Tokens of the prompt, if both answers of a pair follow the same ones."""


class ExampleWriter:
    """Writes examples into an empty folder; `finish` makes them readable.

    One array holds ids and labels: a target is stored as the complement of its id, which is
    negative.
    """

    def __init__(self, folder: Path, vocabulary_size: int) -> None:
        self.folder = folder
        self.dtype: Any = np.dtype(np.int16 if vocabulary_size <= 2**15 else np.int32)
        self.file = (folder / TOKENS).open("wb")
        self.columns: dict[str, list[Column]] = {}
        self.num_tokens = 0

    def add(self, examples: Sequence[TokenizedParts], traits: Sequence[Traits]) -> int:
        """Append examples of one data file with their traits; return the number of targets."""
        if not examples:
            return 0
        parts = [part for example in examples for part in example.parts]
        ids_T = np.array(list(chain.from_iterable(parts)), self.dtype)
        ends_E = np.array([len(example) for example in examples]).cumsum()
        lengths_E = np.diff(ends_E, prepend=0)
        learned = [number % 2 == 1 for example in examples for number in range(len(example.parts))]
        is_target_T = np.repeat(learned, list(map(len, parts)))
        # Nothing predicts the first token.
        is_target_T[ends_E - lengths_E] = False
        self.file.write(np.where(is_target_T, ~ids_T, ids_T).tobytes())
        self._append("ends", ends_E + self.num_tokens)
        self._append("lengths", lengths_E.astype(np.int32))
        num_targets_E = np.add.reduceat(is_target_T, ends_E - lengths_E, dtype=np.int32)
        self._append("num_targets", num_targets_E)
        self._append("rows", np.array([example.origin.row for example in examples], np.int64))
        self._append("contents", np.array([trait.content for trait in traits], np.uint64))
        self._append("prompts", np.array([trait.prompt for trait in traits], np.uint64))
        self._append("oddities", np.array([trait.oddities for trait in traits], np.uint16))
        self._append("ratings", np.array([trait.rating for trait in traits], np.int8))
        self._append("shared", np.array([trait.shared for trait in traits], np.int32))
        self.num_tokens += len(ids_T)
        return int(num_targets_E.sum())

    def add_lines(self, lines: Sequence[str]) -> None:
        """Append the line of each prompt."""
        with (self.folder / LINES).open("ab") as file:
            start = file.tell()
            encoded = [f"{line}\n".encode() for line in lines]
            file.write(b"".join(encoded))
        self._append(
            "line_ends", start + np.cumsum([len(line) for line in encoded], dtype=np.int64)
        )

    def finish(self) -> None:
        """Write the columns and close the files."""
        self.close()
        columns: dict[str, Any] = {
            name: np.concatenate(parts) for name, parts in self.columns.items()
        }
        np.savez(self.folder / COLUMNS, dtype=np.array(self.dtype.str), **columns)

    def close(self) -> None:
        """Close the file of tokens."""
        self.file.close()

    def _append(self, name: str, column: Column) -> None:
        self.columns.setdefault(name, []).append(column)


class StoredFile:
    """The examples of one data file, written by an `ExampleWriter`."""

    def __init__(self, folder: Path, file: Path) -> None:
        self.file = file
        self.folder = folder
        with np.load(folder / COLUMNS) as columns:
            dtype = np.dtype(str(columns["dtype"]))
            self.columns = {name: columns[name] for name in columns.files if name != "dtype"}
        # An empty file cannot be memory-mapped.
        self.tokens_T: Column = (
            np.memmap(folder / TOKENS, dtype, mode="r") if len(self) else np.empty(0, dtype)
        )

    def __len__(self) -> int:
        return len(self.columns.get("ends", ()))

    def example(self, index: int) -> TokenizedExample:
        """The example at an index."""
        end = int(self.columns["ends"][index])
        stored = np.asarray(self.tokens_T[end - int(self.columns["lengths"][index]) : end])
        is_target = stored < 0
        ids = np.where(is_target, ~stored, stored)
        labels = np.where(is_target, ids, IGNORE_INDEX)
        origin = Origin(self.file, int(self.columns["rows"][index]))
        return TokenizedExample(ids.tolist(), labels.tolist(), origin)

    def line(self, index: int) -> str:
        """The line of the prompt at an index."""
        ends_E = self.columns["line_ends"]
        start = int(ends_E[index - 1]) if index else 0
        with (self.folder / LINES).open("rb") as file:
            file.seek(start)
            return file.read(int(ends_E[index]) - start).decode()


Item = TypeVar("Item")


class StoredRows(Sequence[Item]):
    """What is learned from, in rows of several files, in any order."""

    EXAMPLES_EACH: ClassVar[int] = 1
    """Adjacent examples of a file that make one item."""

    def __init__(self, files: Sequence[StoredFile], file_E: Column, index_E: Column) -> None:
        self.files = tuple(files)
        self.file_E = file_E
        self.index_E = index_E

    @classmethod
    def of(cls, files: Sequence[StoredFile]) -> Self:
        """All items of the files, file by file."""
        counts = [len(file) // cls.EXAMPLES_EACH for file in files]
        file_E = np.repeat(np.arange(len(files), dtype=np.int32), counts)
        index_E = np.concatenate([np.arange(count, dtype=np.int64) for count in (*counts, 0)])
        return cls(files, file_E, index_E)

    @classmethod
    def joined(cls, parts: Iterable["StoredRows[Item]"]) -> Self:
        """The items of all parts, one after the other."""
        parts = list(parts)
        offsets = np.cumsum([0, *(len(part.files) for part in parts)])
        nothing = np.empty(0, np.int64)
        files = [file for part in parts for file in part.files]
        file_E = [part.file_E + offset for part, offset in zip(parts, offsets, strict=False)]
        index_E = [part.index_E for part in parts]
        return cls(files, np.concatenate([nothing, *file_E]), np.concatenate([nothing, *index_E]))

    def select(self, indices: NDArray[Any]) -> Self:
        """The items at these indices."""
        return type(self)(self.files, self.file_E[indices], self.index_E[indices])

    def __len__(self) -> int:
        return len(self.index_E)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Item | Self:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return self.item(self.files[self.file_E[index]], int(self.index_E[index]))

    @abstractmethod
    def item(self, file: StoredFile, index: int) -> Item:
        """The item of a file at an index."""

    @property
    @abstractmethod
    def examples(self) -> "Examples":
        """Every example, in order: both answers of a pair."""

    def origin(self, index: int) -> Origin:
        """The origin of an item, without reading its tokens."""
        file = self.files[self.file_E[index]]
        place = self.index_E[index] * self.EXAMPLES_EACH
        return Origin(file.file, int(file.columns["rows"][place]))

    @cached_property
    def lengths(self) -> Column:
        """Number of tokens of each item, shape [E]."""
        return self.total("lengths")

    @cached_property
    def num_targets(self) -> Column:
        """Number of targets of each item, shape [E]."""
        return self.total("num_targets")

    def total(self, name: str) -> Column:
        """A number of every item, summed over its examples, shape [E]."""
        column_E: Column = self.examples.column(name).reshape(-1, self.EXAMPLES_EACH).sum(axis=1)
        return column_E

    @property
    def row_E(self) -> Column:
        """A number for the row of each item: rows of a file of pairs give two rated examples."""
        return np.arange(len(self))

    @property
    def split_E(self) -> Column:
        """A number for each item; items with the same number must not be split up."""
        return np.arange(len(self))


class Examples(StoredRows[TokenizedExample]):
    """Tokenized conversations and texts."""

    def item(self, file: StoredFile, index: int) -> TokenizedExample:
        """The example of a file at an index."""
        return file.example(index)

    @property
    def examples(self) -> "Examples":
        """Itself."""
        return self

    def column(self, name: str) -> Column:
        """A fact about every example, shape [E]; see `Traits`."""
        whole = np.zeros(len(self), np.uint64 if name in ("contents", "prompts") else np.int64)
        for number, file in enumerate(self.files):
            here_E = self.file_E == number
            if here_E.any():
                whole[here_E] = file.columns[name][self.index_E[here_E]]
        return whole


class Pairs(StoredRows[TokenizedPair]):
    """Better and worse answers to the same prompts."""

    EXAMPLES_EACH = 2

    def item(self, file: StoredFile, index: int) -> TokenizedPair:
        """The pair of a file at an index."""
        return TokenizedPair(file.example(2 * index), file.example(2 * index + 1))

    @property
    def examples(self) -> Examples:
        """Both answers of each pair, the better one first."""
        index_E = np.stack([2 * self.index_E, 2 * self.index_E + 1], axis=1).reshape(-1)
        return Examples(self.files, np.repeat(self.file_E, 2), index_E)

    @property
    def chosen(self) -> Examples:
        """The better answer of each pair."""
        return Examples(self.files, self.file_E, 2 * self.index_E)

    @property
    def rejected(self) -> Examples:
        """The worse answer of each pair."""
        return Examples(self.files, self.file_E, 2 * self.index_E + 1)

    @property
    def split_E(self) -> Column:
        """A number for the prompt of each pair."""
        return numbered(self.chosen.column("prompts"))


class RatedExamples(StoredRows[RatedExample]):
    """Answers that are marked good or bad."""

    def item(self, file: StoredFile, index: int) -> RatedExample:
        """The rated example of a file at an index."""
        return RatedExample(file.example(index), bool(file.columns["ratings"][index] > 0))

    @property
    def examples(self) -> Examples:
        """The answers without their marks."""
        return Examples(self.files, self.file_E, self.index_E)

    @property
    def row_E(self) -> Column:
        """A number for the row of each answer."""
        rows_E = self.examples.column("rows")
        is_new_E = (np.diff(rows_E, prepend=-1) != 0) | (np.diff(self.file_E, prepend=-1) != 0)
        return is_new_E.cumsum() - 1

    @property
    def split_E(self) -> Column:
        """A number for the prompt of each answer."""
        return numbered(self.examples.column("prompts"))


def numbered(keys_E: Column) -> Column:
    """For each key its number, in the order in which they first occur."""
    _, first, number_E = np.unique(keys_E, return_index=True, return_inverse=True)
    return first.argsort().argsort()[number_E]
