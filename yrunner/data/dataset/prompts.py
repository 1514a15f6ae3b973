"""Prompts to write answers to, with the columns of their rows that rewards read."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from yrunner.data.chat.tokenize import with_system
from yrunner.data.conversation import Conversation, Message
from yrunner.data.dataset.examples import Column, Examples, StoredFile, StoredRows, numbered
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


def as_line(prompt: Conversation, system: str | None) -> str:
    """What `Prompts.item` reads besides the tokens."""
    messages = [asdict(message) for message in with_system(prompt.messages, system)]
    # Tables hold dates and decimals, which JSON has not.
    return json.dumps({"messages": messages, "columns": prompt.columns}, default=str)
