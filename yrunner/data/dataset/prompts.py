"""Prompts to write answers to, with the columns of their rows that rewards read."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from yrunner.data.conversation import Message
from yrunner.data.dataset.examples import Column, Examples, StoredFile, StoredRows, numbered
from yrunner.data.dataset.quality import Finding, find_oddities, finding
from yrunner.errors import Origin


@dataclass(frozen=True)
class PromptRow:
    """A prompt as tokens and as messages, and the row that it comes from."""

    input_ids: list[int]
    """With the opening of the reply, as at inference."""
    messages: tuple[Message, ...]
    """With the system message of the recipe, if the row has none."""
    columns: Mapping[str, Any]
    """Every column of the row, and `answer` if it ends with a reply."""
    origin: Origin


class Prompts(StoredRows[PromptRow]):
    """Tokenized prompts, with what rewards read."""

    def item(self, file: StoredFile, index: int) -> PromptRow:
        """The prompt of a file at an index."""
        example, line = file.example(index), json.loads(file.line(index))
        messages = tuple(
            Message(**message | {"tool_calls": tuple(message["tool_calls"])})
            for message in line["messages"]
        )
        return PromptRow(example.input_ids, messages, line["columns"], example.origin)

    @property
    def examples(self) -> Examples:
        """The prompts without their columns; they have no targets."""
        return Examples(self.files, self.file_E, self.index_E)

    @property
    def split_E(self) -> Column:
        """A number for each prompt; equal ones have the same."""
        return numbered(self.examples.column("contents"))


def as_line(messages: Sequence[Message], columns: Mapping[str, Any] | None) -> str:
    """What `Prompts.item` reads besides the tokens."""
    line = {"messages": [asdict(message) for message in messages], "columns": columns}
    # Tables hold dates and decimals, which JSON has not.
    return json.dumps(line, default=str)


def find_among_prompts(train: Prompts, validation: Prompts) -> list[Finding]:
    """Every kind of finding that occurs among prompts."""
    return [found for found in _all_findings(train, validation) if found.count]


def _all_findings(train: Prompts, validation: Prompts) -> Iterator[Finding]:
    contents_E = train.examples.column("contents")
    _, first = np.unique(contents_E, return_index=True)
    is_repeated_E = np.ones(len(train), bool)
    is_repeated_E[first] = False
    yield finding("repeated prompts in train", train, is_repeated_E)
    is_known_E = np.isin(validation.examples.column("contents"), contents_E)
    yield finding("validation prompts that are also in train", validation, is_known_E)
    for name, rows in (("train", train), ("validation", validation)):
        yield from find_oddities(name, rows, rows.examples.column("oddities"))
