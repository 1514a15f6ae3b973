"""The recipe's `rewards`: what makes an answer good, for `train.stage: rl`.

Every reward but `reward_model` and `python` gives an answer 0 to 1.
"""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from yrunner.errors import YRunnerError
from yrunner.recipe.schema.section import RecipeFile, RecipePlace, Section, existing_file
from yrunner.text_files import functions_of, read_json, schema_fault


def _tag(text: str) -> str:
    if not re.fullmatch(r"[^\W\d][\w.-]*", text):
        raise ValueError(
            f'"{text}" is not the name of a tag; write it without brackets, such as answer'
        )
    return text


def _tags(names: list[str]) -> list[str]:
    double = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if double is not None:
        raise ValueError(f'"{double}" is given twice; remove one of them')
    return names


def _pattern(text: str) -> str:
    # Imported here: `--help` does not need it.
    import regex

    try:
        regex.compile(text)
    except regex.error as error:
        raise ValueError(f'"{text}" is not a valid regular expression: {error}') from error
    return text


def _json_schema(value: dict[str, Any]) -> dict[str, Any]:
    fault = schema_fault(value)
    if fault is not None:
        raise ValueError(f"this is not a JSON Schema: {fault}")
    return value


def _schema_file(path: Path, info: ValidationInfo) -> Path:
    if info.context is not None:
        try:
            fault = schema_fault(read_json(path))
        except YRunnerError as error:
            raise ValueError(str(error)) from error
        if fault is not None:
            raise ValueError(f"{path} is not a JSON Schema: {fault}")
    return path


def _python_function(text: str, info: ValidationInfo) -> str:
    """`file:name` with the absolute path of the file; it is parsed, but not run."""
    name, colon, function = text.rpartition(":")
    if not colon or not function.isidentifier():
        raise ValueError(f'"{text}" names no function; write file.py:name')
    if info.context is None:
        return text
    file = existing_file(Path(name), info)
    try:
        defined = functions_of(file)
    except YRunnerError as error:
        raise ValueError(str(error)) from error
    if function not in defined:
        near = get_close_matches(function, defined, n=1)
        hint = (
            f', did you mean "{near[0]}"?' if near else f"; it has {', '.join(defined) or 'none'}"
        )
        raise ValueError(f'{file} has no function "{function}"{hint}')
    return f"{file}:{function}"


Difference = Literal["case", "width", "punctuation", "blanks"]
Tag = Annotated[str, AfterValidator(_tag)]
PythonFunction = Annotated[str, Field(min_length=1), AfterValidator(_python_function)]
Tags = Annotated[list[Tag], Field(min_length=1), AfterValidator(_tags)]
SchemaFile = Annotated[RecipeFile, AfterValidator(_schema_file)]
JsonSchema = Annotated[dict[str, Any], AfterValidator(_json_schema)]


class NamedReward(Section):
    """Keys shared by all kinds of reward."""

    name: str | None = Field(None, min_length=1)
    """Name in tables, in metrics and in rollouts.jsonl. Default: its kind."""
    weight: float = 1.0
    """Factor of this reward in the sum. Negative: a penalty. 0: shown, but not counted."""

    @property
    def shown_name(self) -> str:
        """Its name, or its kind."""
        return self.name or str(getattr(self, "kind"))  # noqa: B009 - each kind of reward has one


class TextReward(NamedReward):
    """Keys shared by the rewards that read what an answer says."""

    tag: Tag | None = None
    """Read only what the last <tag> ... </tag> of the answer encloses; an answer without it gets
    0. Default: the whole answer without its thinking."""


class ExactReward(TextReward):
    """The answer is the one in the row: 1, else 0."""

    kind: Literal["exact"]
    column: str = Field("answer", min_length=1)
    """Column with the right answer, or a list of right answers."""
    ignore: list[Difference] = Field(["case", "width", "punctuation", "blanks"])
    """Differences that do not count. `width`: full-width letters and digits of Chinese text."""


class PatternReward(TextReward):
    """The answer matches a regular expression: 1, else 0."""

    kind: Literal["pattern"]
    pattern: Annotated[str, Field(min_length=1), AfterValidator(_pattern)]
    """In Python's `re` syntax; a dot also matches a newline."""
    match: Literal["anywhere", "whole"] = "anywhere"
    """Whether the pattern may occur anywhere, or must match the whole text."""


class XmlReward(NamedReward):
    """The answer consists of tags in this order: <reasoning> ... </reasoning> <answer> ..."""

    kind: Literal["xml"]
    tags: Tags = Field(["reasoning", "answer"])
    """The tags, in their order."""
    grade: Literal["parts", "whole"] = "parts"
    """`parts`: the share of the form that is right. `whole`: 1 if all of it is, else 0."""


class NumberReward(TextReward):
    """The last number of the answer is that of the row: 1, else 0."""

    kind: Literal["number"]
    column: str = Field("answer", min_length=1)
    """Column with the right number, or a text whose last number is right."""
    tolerance: float = Field(0.0, ge=0)
    """Difference up to which a number is right."""
    relative_tolerance: float = Field(0.0, ge=0, lt=1)
    """The same, as a share of the right number. The larger of both counts."""


class JsonSchemaReward(TextReward):
    """The answer is JSON and matches a JSON Schema: 1, else 0."""

    kind: Literal["json_schema"]
    file: SchemaFile | None = None
    """A file with the schema."""
    json_schema: JsonSchema | None = None
    """Instead of file: the schema itself."""
    column: str | None = Field(None, min_length=1)
    """Instead of file: the column of the row with its schema. Default, without both: schema."""
    grade: Literal["parts", "whole"] = "whole"
    """`whole`: 1 if it matches, else 0. `parts`: 0.5 for JSON that does not match."""

    @model_validator(mode="after")
    def one_schema(self) -> Self:
        given = [key for key in ("file", "json_schema", "column") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} cannot be combined; keep one of them")
        return self

    @property
    def schema_column(self) -> str:
        """The column with the schema of each row, without file and json_schema."""
        return self.column or "schema"


class LengthReward(TextReward):
    """The answer's length is in a range: 1, else less."""

    kind: Literal["length"]
    unit: Literal["tokens", "words", "characters"] = "tokens"
    """`words`: words, numbers and Chinese characters. `tokens`: of the whole answer."""
    minimum: int = Field(0, ge=0)
    """Shortest length that gets 1."""
    maximum: int | None = Field(None, ge=1)
    """Longest length that gets 1."""
    margin: int = Field(0, ge=0)
    """Distance from the range over which the reward falls from 1 to 0."""

    @model_validator(mode="after")
    def a_range(self) -> Self:
        if self.maximum is None and not self.minimum:
            raise ValueError("needs minimum, maximum or both")
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError("maximum must not be below minimum")
        if self.unit == "tokens" and self.tag is not None:
            raise ValueError(
                "unit tokens counts the whole answer; set unit to words or characters, "
                "or remove tag"
            )
        return self


class RepetitionReward(TextReward):
    """1 minus the share of the text that repeats itself."""

    kind: Literal["repetition"]
    measure: Literal["ngrams", "windowed"] = "ngrams"
    """`ngrams`: share of the n-grams that occur more than once. `windowed`: a repeat counts more
    the nearer it is, and not at all beyond 50 words."""
    size: int = Field(4, ge=1)
    """Words of an n-gram; Chinese characters, numbers and signs count as words."""


class LanguageReward(TextReward):
    """The share of the answer's letters that are of one language's script."""

    kind: Literal["language"]
    language: Literal["zh", "en"]
    """`zh`: Chinese characters. `en`: Latin letters. An answer without letters is not judged."""


class RewardModelReward(NamedReward):
    """The score of a reward model."""

    kind: Literal["reward_model"]
    model: RecipePlace
    """The folder of a reward model, such as `model` in the run folder of `train.stage: reward`; or
    the recipe of such a run, which is trained first if missing."""
    batch_size: int = Field(16, ge=1)
    """Answers scored at once."""


class PythonReward(NamedReward):
    """A function of your own; it needs --trust-code."""

    kind: Literal["python"]
    function: PythonFunction
    """`file.py:name`, relative to the recipe; see docs/guide/rewards.md."""


RewardSection = Annotated[
    ExactReward
    | PatternReward
    | XmlReward
    | NumberReward
    | JsonSchemaReward
    | LengthReward
    | RepetitionReward
    | LanguageReward
    | RewardModelReward
    | PythonReward,
    Field(discriminator="kind"),
]
