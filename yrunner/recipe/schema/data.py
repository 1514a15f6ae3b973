"""The recipe's `data`: what is learned from, and which of its tokens count."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from yrunner.recipe.schema.section import HubId, RecipePlace, Section


class DataFile(Section):
    """One place of data and how to read it."""

    file: RecipePlace | None = None
    """A json, jsonl, csv, tsv, parquet or txt file, also packed as .gz; a folder of such files, or
    a glob. Relative to the recipe."""
    hub: HubId | None = None
    """Or: the name of a dataset of the Hub, `organisation/name`, downloaded once."""
    files: str | None = Field(None, min_length=1)
    """Which files of the Hub dataset: a name or a glob, where * also stands for folders; default
    its only data file, or those of the split train."""
    revision: str | None = Field(None, min_length=1)
    """Branch, tag or commit of the Hub dataset; a commit is the same data for ever."""
    format: Literal[
        "auto", "alpaca", "sharegpt", "messages", "prompt_response", "question_answer", "text"
    ] = "auto"
    """What a row looks like. auto looks at the keys of the rows and says what it chose."""
    columns: dict[str, str] = Field({})
    """Names in this file for the names of the format: `{instruction: question, output: reply}`."""
    document: Literal["line", "file"] = "line"
    """What one document is in a txt file: a line, or the whole file."""
    take: int | None = Field(None, ge=1)
    """How many of the rows to use, chosen at random by the seed; default all."""
    share: float | None = Field(None, gt=0, lt=1)
    """Or: the share of the rows to use, chosen at random by the seed."""

    @model_validator(mode="before")
    @classmethod
    def a_name_alone_is_no_section(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f'a section is needed here, got "{value}"; write {{file: {value}}}')
        return value

    @model_validator(mode="after")
    def exactly_one_origin(self) -> Self:
        if self.file is not None and self.hub is not None:
            raise ValueError("file and hub cannot be combined; give each an entry of its own")
        if self.file is None and self.hub is None:
            raise ValueError("give either file, a path, or hub, the name of a dataset")
        return self

    @model_validator(mode="after")
    def only_the_hub_has_files_and_revisions(self) -> Self:
        for key in ("files", "revision"):
            if self.hub is None and getattr(self, key) is not None:
                raise ValueError(f"{key} needs hub, the name of a dataset; remove it")
        return self

    @model_validator(mode="after")
    def documents_are_in_txt_files(self) -> Self:
        name = "" if self.file is None else self.file.name.lower().removesuffix(".gz")
        if self.document == "file" and name.endswith(
            (".json", ".jsonl", ".csv", ".tsv", ".parquet")
        ):
            raise ValueError("document: file is for txt files only; remove it")
        return self

    @model_validator(mode="after")
    def take_or_share(self) -> Self:
        if self.take is not None and self.share is not None:
            raise ValueError("take and share cannot be combined; remove one")
        return self


class DataSection(Section):
    """What is learned from, and which of its tokens count."""

    system: str | None = None
    """System message for conversations that have none."""
    max_length: int = Field(2048, ge=2)
    """Longest example in tokens."""
    too_long: Literal["refuse", "drop", "cut", "split"] = "refuse"
    """What happens to a longer one: stop before training, leave it out, or cut its end off.
    split makes several of a long text, so that all of it is learned; for conversations it is as
    refuse."""
    invalid: Literal["refuse", "drop"] = "refuse"
    """What happens to a row that cannot be used: stop before training, or leave it out, counted."""
    packing: bool = False
    """Fill rows of max_length with several examples each, which do not see each other. With
    train.order as_written only neighbours share a row."""
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
