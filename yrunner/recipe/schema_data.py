"""The recipe's `data`: what is learned from, and which of its tokens count."""

from typing import Literal, Self

from pydantic import Field, model_validator

from yrunner.recipe.section import RecipeFile, Section


class DataFile(Section):
    """One data file and how to read it."""

    file: RecipeFile
    """A json, jsonl, csv, parquet or txt file, relative to the recipe."""
    format: Literal["auto", "alpaca", "messages", "text"] = "auto"
    """What a row looks like. auto looks at the keys of the rows and says what it chose."""
    columns: dict[str, str] = Field({})
    """Names in this file for the names of the format: `{instruction: question, output: reply}`."""


class DataSection(Section):
    """What is learned from, and which of its tokens count."""

    system: str | None = None
    """System message for conversations that have none."""
    max_length: int = Field(2048, ge=2)
    """Longest example in tokens."""
    too_long: Literal["refuse", "drop", "cut"] = "refuse"
    """What happens to a longer one: stop before training, leave it out, or cut its end off."""
    invalid: Literal["refuse", "drop"] = "refuse"
    """What happens to a row that cannot be used: stop before training, or leave it out, counted."""
    targets: Literal["assistant", "last_assistant", "all"] = "assistant"
    """The tokens whose loss counts: every assistant turn, the last one, or everything."""
    train: list[DataFile] = Field(min_length=1)
    """Files to learn from."""
    validation: list[DataFile] = Field([])
    """Files to watch the loss on; never learned from."""
    validation_share: float | None = Field(None, gt=0, lt=1)
    """Or: the share of the training rows that is set aside for validation."""

    @model_validator(mode="after")
    def one_source_of_validation(self) -> Self:
        if self.validation and self.validation_share is not None:
            raise ValueError("validation and validation_share cannot be combined; remove one")
        return self
