"""The recipe's `eval`: what is measured of a model, and how it writes its answers."""

import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from yrunner.recipe.schema.section import RecipeFile, RecipePlace, Section

Side = Literal["domain", "general", "quality"]
"""domain: what is being learned. general: what must not be forgotten. quality: how it reads."""


def _regular_expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f'"{text}" is no regular expression: {error}') from error
    return text


def _without_doubles(words: list[str]) -> list[str]:
    double = next((word for number, word in enumerate(words) if word in words[:number]), None)
    if double is not None:
        raise ValueError(f'"{double}" is given twice; remove one of them')
    return words


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_regular_expression)]
Words = Annotated[list[Annotated[str, Field(min_length=1)]], AfterValidator(_without_doubles)]


class Decoding(Section):
    """What all ways to write an answer share."""

    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1, tokens that the text already has become less likely."""


class GreedyWriting(Decoding):
    """Always the likeliest token: one answer for ever."""

    kind: Literal["greedy"] = "greedy"


class SampleWriting(Decoding):
    """Draw each token at random, by its probability."""

    kind: Literal["sample"]
    temperature: float = Field(0.7, gt=0)
    """Below 1 the likely tokens gain, above 1 the unlikely ones."""
    top_k: int = Field(0, ge=0)
    """Draw from so many of the likeliest tokens; 0 = all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the fewest tokens that together have this probability."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Leave out tokens with less than this share of the likeliest token's probability."""


class BeamWriting(Decoding):
    """Follow several beginnings at once, and take the likeliest answer as a whole."""

    kind: Literal["beams"]
    num_beams: int = Field(4, ge=2)
    """How many beginnings are followed."""


class DynamicWriting(Decoding):
    """Draw freely where the model is unsure, and not at all where it is sure."""

    kind: Literal["dynamic"]
    greedy_below: float = Field(0.5, ge=0)
    """Entropy in nats up to which the likeliest token is taken."""
    free_above: float = Field(3.0, gt=0)
    """Entropy in nats from which on temperature and top_k are as given; they rise up to there."""
    temperature: float = Field(1.0, gt=0)
    """Temperature where the model is unsure."""
    top_k: int = Field(50, ge=1)
    """Number of tokens to draw from where the model is unsure."""

    @model_validator(mode="after")
    def entropies_are_in_order(self) -> Self:
        if self.free_above <= self.greedy_below:
            raise ValueError("free_above must be above greedy_below")
        return self


Generation = Annotated[
    GreedyWriting | SampleWriting | BeamWriting | DynamicWriting, Field(discriminator="kind")
]


class NamedTask(Section):
    """What the tasks of all kinds share."""

    name: str = Field(min_length=1)
    """How tables and reports call it."""
    side: Side
    """domain: what is being learned. general: what must not be forgotten. quality: how it reads."""


class WritingTask(NamedTask):
    """A task whose answers the model writes."""

    data: RecipeFile
    """Rows in any conversation format; the last assistant turn is the reference."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer."""


class AnswerTask(WritingTask):
    """Questions with a reference answer: exact match, words in common, ROUGE-L, BLEU, chrF."""

    kind: Literal["answer"] = "answer"


class ClassifyTask(WritingTask):
    """Questions whose answer is one of a few labels: accuracy, macro-F1, confusion matrix."""

    kind: Literal["classify"]
    labels: Words = Field([])
    """The labels; default those of the data. Each must occur in it, and no other."""
    by: Literal["writing", "likelihood"] = "writing"
    """writing: the model writes the label. likelihood: the label is taken that it finds likeliest.
    """

    @model_validator(mode="after")
    def two_labels_at_least(self) -> Self:
        if len(self.labels) == 1:
            raise ValueError("one label leaves nothing to choose; add the others to labels")
        return self


class ChoiceTask(NamedTask):
    """Multiple choice: the choice is taken that the model finds likeliest for its length."""

    kind: Literal["choice"]
    data: RecipeFile
    """Rows with a question, its choices (a list, or columns A, B, C, D) and the right one: its
    number from 0, its letter, or its text."""
    question: str = "question"
    """Column of the question."""
    choices: str | Words = "choices"
    """Column of the list of choices, or the columns that hold one choice each."""
    answer: str = "answer"
    """Column of the right choice."""


class PerplexityTask(NamedTask):
    """How likely a model finds texts, or the answers of conversations."""

    kind: Literal["perplexity"]
    data: RecipeFile
    """Texts, or rows in any conversation format, of which the last assistant turn counts."""
    window: int = Field(1024, ge=2)
    """A longer text is measured in pieces of so many tokens."""


class RegexForm(Section):
    """The whole answer matches a regular expression."""

    kind: Literal["regex"]
    pattern: Pattern
    """In the form of Python's `re`; a dot matches a line end too."""


class JsonForm(Section):
    """The whole answer is JSON, and follows a JSON Schema where one is given."""

    kind: Literal["json"]
    json_schema: RecipeFile | None = None
    """A file with a JSON Schema."""


Form = Annotated[RegexForm | JsonForm, Field(discriminator="kind")]


class FormatTask(WritingTask):
    """Share of the answers that have a form; the rows need no reference."""

    kind: Literal["format"]
    form: Form
    """What an answer must look like."""


class Rule(Section):
    """A regular expression that an answer must, or must not, contain."""

    name: str = Field(min_length=1)
    """How tables and reports call it."""
    must_match: Pattern | None = None
    """A right answer has a place that matches this."""
    must_not_match: Pattern | None = None
    """Or: a right answer has no such place."""

    @model_validator(mode="after")
    def one_of_both(self) -> Self:
        if (self.must_match is None) == (self.must_not_match is None):
            raise ValueError("give one of must_match and must_not_match; make two rules of both")
        return self


class RuleTask(WritingTask):
    """Share of the answers that keep rules of the business; the rows need no reference."""

    kind: Literal["judge_by_rule"]
    rules: list[Rule] = Field(min_length=1)
    """Each has its own figure; an answer is right that keeps them all."""

    @model_validator(mode="after")
    def rules_have_names_of_their_own(self) -> Self:
        check_names([rule.name for rule in self.rules], "rules")
        return self


class QualityTask(WritingTask):
    """How well the answers read: repetition, variety, density, length; needs no reference."""

    kind: Literal["quality"]
    side: Side = "quality"
    """domain: what is being learned. general: what must not be forgotten. quality: how it reads."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer. Short ones show little of a model's habits."""


class HarnessTask(NamedTask):
    """Tasks of lm-evaluation-harness, which has to be installed: `pip install yrunner[harness]`."""

    kind: Literal["harness"]
    tasks: Words = Field(min_length=1)
    """Their names in the harness."""
    include: RecipePlace | None = None
    """A folder with tasks of your own, in the harness's YAML."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples shown before each question; default what the task says."""
    limit: int | None = Field(None, ge=1)
    """Ask only so many questions of each task."""
    chat_template: bool = True
    """Ask in the form of the model's chat template."""


Task = Annotated[
    AnswerTask
    | ClassifyTask
    | ChoiceTask
    | PerplexityTask
    | FormatTask
    | RuleTask
    | QualityTask
    | HarnessTask,
    Field(discriminator="kind"),
]


class FaultList(Section):
    """Training rows that are known to be wrong: how many of them does the model repeat?"""

    data: RecipeFile
    """The training file."""
    list: RecipeFile
    """A jsonl file: `row`, counted from 1, of each faulty row of `data`; `right`, the answer it
    should have had, and `kind`, a word for the fault, may be added."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest answer; longer than the faulty ones, or they cannot be repeated."""


class EvalSection(Section):
    """What is measured of the base and the result."""

    tasks: list[Task] = Field([])
    batch_size: int = Field(64, ge=1)
    """Questions answered at once. It cannot change an answer in float32."""
    generation: Generation = GreedyWriting()
    """How answers are written, by `yrun eval` and `yrun chat`. `yrun train` always takes the
    likeliest token."""
    faults: FaultList | None = None
    """Look for memorised faults."""

    @model_validator(mode="after")
    def tasks_have_names_of_their_own(self) -> Self:
        check_names([task.name for task in self.tasks], "tasks")
        return self


def check_names(names: Sequence[str], what: str) -> None:
    """Raise `ValueError` where two things have one name: reports could not tell them apart."""
    double = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if double is not None:
        raise ValueError(f'two {what} have the name "{double}"; give each a name of its own')
