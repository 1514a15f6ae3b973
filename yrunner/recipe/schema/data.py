"""The recipe's `data`: the training data, and which of its tokens are targets."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from yrunner.recipe.schema.section import HubId, RecipePlace, Section, SortRecipe


class DataFile(Section):
    """A source of data and how to read it."""

    file: RecipePlace | None = None
    """A json, jsonl, csv, tsv, parquet, arrow or txt file, optionally compressed as .gz; a folder
    of such files, also one that `save_to_disk` of the datasets library wrote; or a glob. Files
    named after a split (`train`, `validation`, `test`) serve only their purpose. Relative to the
    recipe."""
    hub: HubId | None = None
    """Instead of file: a dataset on the Hub, `organisation/name`, downloaded once."""
    sorted: SortRecipe | None = None
    """Instead of file: a recipe whose training rows `yrun sort` orders and cleans. `yrun train`
    sorts them first if that is missing or its recipe or data have changed. The rows keep their new
    order with train.order: as_written. Only for training data. Relative to the recipe."""
    files: str | None = Field(None, min_length=1)
    """Which files of the Hub dataset: a name or a glob, where `*` also matches `/`. Default: its
    only data file, or the files of its train split."""
    revision: str | None = Field(None, min_length=1)
    """Branch, tag or commit of the Hub dataset; only a commit pins the data."""
    format: Literal[
        "auto", "alpaca", "sharegpt", "messages", "prompt_response", "question_answer", "text"
    ] = "auto"
    """Format of a row. `auto` detects it from the keys of the rows and prints its choice. With
    train.stage: preference, each also has better and worse answers; `text` names who speaks."""
    columns: dict[str, str] = Field({})
    """Column for each name of the format: `{instruction: question, output: reply}`."""
    document: Literal["line", "file"] = "line"
    """What counts as one document in a txt file: each line, or the whole file."""
    take: int | None = Field(None, ge=1)
    """Number of rows to use, chosen at random with the seed. Default: all."""
    share: float | None = Field(None, gt=0, lt=1)
    """Instead of take: the share of rows to use, chosen at random with the seed."""

    @model_validator(mode="before")
    @classmethod
    def a_name_alone_is_no_section(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f'must be a section, got "{value}"; write {{file: {value}}}')
        return value

    @model_validator(mode="after")
    def exactly_one_origin(self) -> Self:
        origins = [name for name in ("file", "hub", "sorted") if getattr(self, name) is not None]
        if len(origins) > 1:
            raise ValueError(f"{' and '.join(origins)} cannot be combined; write two entries")
        if not origins:
            raise ValueError(
                "needs file, a path; hub, the name of a dataset; or sorted, a recipe to sort"
            )
        return self

    @model_validator(mode="after")
    def sorted_rows_are_read_as_they_were(self) -> Self:
        for key in ("format", "columns", "document"):
            if self.sorted is not None and key in self.model_fields_set:
                raise ValueError(f"{key} belongs into the recipe that sorted names; move it there")
        return self

    @model_validator(mode="after")
    def only_the_hub_has_files_and_revisions(self) -> Self:
        for key in ("files", "revision"):
            if self.hub is None and getattr(self, key) is not None:
                raise ValueError(f"{key} applies only to hub, not to file; remove it")
        return self

    @model_validator(mode="after")
    def documents_are_in_txt_files(self) -> Self:
        name = "" if self.file is None else self.file.name.lower().removesuffix(".gz")
        if self.document == "file" and name.endswith(
            (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
        ):
            raise ValueError("document: file applies only to txt files; remove it")
        return self

    @model_validator(mode="after")
    def take_or_share(self) -> Self:
        if self.take is not None and self.share is not None:
            raise ValueError("take and share cannot be combined; remove one")
        return self


class DataSection(Section):
    """The training data, and which of its tokens are targets."""

    system: str | None = None
    """System message for conversations that have none."""
    max_length: int = Field(2048, ge=2)
    """Maximum length of an example in tokens."""
    too_long: Literal["refuse", "drop", "cut", "split"] = "refuse"
    """What to do with a longer example. `refuse`: stop before training. `drop`: leave it out.
    `cut`: truncate it. `split`: divide a long text into several examples; for conversations the
    same as `refuse`."""
    invalid: Literal["refuse", "drop"] = "refuse"
    """What to do with an unusable row: stop before training, or drop it and report the count."""
    altered: Literal["refuse", "drop", "allow"] = "refuse"
    """What to do with a row if the chat template changes or removes text of its last learned reply,
    such as the thinking, or if thinking marks in that reply are unbalanced. `refuse`: stop before
    training. `drop`: leave it out. `allow`: train on what the template writes."""
    packing: bool = False
    """Pack several examples into a row of max_length tokens, isolated from each other. With
    train.order: as_written, only neighbours share a row."""
    targets: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which tokens are targets: every assistant turn, the last assistant turn, or all tokens. Of a
    better and a worse answer only the turns behind their common prompt are."""
    train: list[DataFile] = Field(min_length=1)
    """Training data."""
    validation: list[DataFile] = Field([])
    """Validation data, never trained on."""
    validation_share: float | None = Field(None, gt=0, lt=1)
    """Instead of validation: the share of training rows to set aside for it."""

    @model_validator(mode="after")
    def only_training_rows_are_sorted(self) -> Self:
        if any(entry.sorted is not None for entry in self.validation):
            raise ValueError("validation cannot be sorted; name its file")
        return self

    @property
    def validates(self) -> bool:
        """Whether there are validation rows."""
        return bool(self.validation) or self.validation_share is not None

    @model_validator(mode="after")
    def one_source_of_validation(self) -> Self:
        if self.validation and self.validation_share is not None:
            raise ValueError("validation and validation_share cannot be combined; remove one")
        return self
