"""The recipe's `eval`: the tasks to measure, and how answers are generated."""

import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from yrunner.recipe.schema.section import RecipeFile, RecipePlace, Section

AnswerHeadline = Literal["exact", "contains", "f1", "rouge_l"]
Side = Literal["domain", "general", "quality"]
"""`domain`: what to learn. `general`: what not to forget. `quality`: how the text reads."""


def _regular_expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f'"{text}" is not a valid regular expression: {error}') from error
    return text


def _without_doubles(words: list[str]) -> list[str]:
    double = next((word for number, word in enumerate(words) if word in words[:number]), None)
    if double is not None:
        raise ValueError(f'"{double}" is given twice; remove one of them')
    return words


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_regular_expression)]
Words = Annotated[list[Annotated[str, Field(min_length=1)]], AfterValidator(_without_doubles)]


class Decoding(Section):
    """Keys shared by all kinds of generation."""

    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1, tokens that already occur in the text become less likely."""


class GreedyWriting(Decoding):
    """Always take the most likely token; deterministic."""

    kind: Literal["greedy"] = "greedy"


class SampleWriting(Decoding):
    """Sample each token from the model's distribution."""

    kind: Literal["sample"]
    temperature: float = Field(0.7, gt=0)
    """Below 1 favours likely tokens, above 1 unlikely ones."""
    top_k: int = Field(0, ge=0)
    """Sample from the k most likely tokens; 0: from all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this total probability."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Exclude tokens below this share of the most likely token's probability."""


class BeamWriting(Decoding):
    """Beam search: the most likely answer as a whole."""

    kind: Literal["beams"]
    num_beams: int = Field(4, ge=2)
    """Number of beams."""


class DynamicWriting(Decoding):
    """Sample where the model is uncertain; take the most likely token where it is confident."""

    kind: Literal["dynamic"]
    greedy_below: float = Field(0.5, ge=0)
    """Entropy in nats up to which the most likely token is taken."""
    free_above: float = Field(3.0, gt=0)
    """Entropy in nats at which temperature and top_k reach their full values."""
    temperature: float = Field(1.0, gt=0)
    """Temperature at full uncertainty."""
    top_k: int = Field(50, ge=1)
    """Number of tokens to sample from at full uncertainty."""

    @model_validator(mode="after")
    def entropies_are_in_order(self) -> Self:
        if self.free_above <= self.greedy_below:
            raise ValueError("free_above must be above greedy_below")
        return self


Generation = Annotated[
    GreedyWriting | SampleWriting | BeamWriting | DynamicWriting, Field(discriminator="kind")
]


class NamedTask(Section):
    """Keys shared by all kinds of task."""

    name: str = Field(min_length=1)
    """Name in tables and reports."""
    side: Side
    """`domain`: what to learn. `general`: what not to forget. `quality`: how the text reads."""


class WritingTask(NamedTask):
    """Keys shared by the tasks whose answers the model generates."""

    data: RecipeFile
    """Rows in any conversation format; the last assistant turn is the reference."""
    max_new_tokens: int = Field(64, ge=1)
    """Maximum length of an answer in tokens."""


class AnswerTask(WritingTask):
    """Questions with a reference answer: exact match, word overlap, ROUGE-L, BLEU, chrF."""

    kind: Literal["answer"] = "answer"
    headline: AnswerHeadline | None = None
    """The main figure. Default: `exact` if half of the references or more have at most 10 words,
    numbers and Chinese characters, else `rouge_l`."""


class ClassifyTask(WritingTask):
    """Questions whose answer is one of a few labels: accuracy, macro-F1, confusion matrix."""

    kind: Literal["classify"]
    labels: Words = Field([])
    """The labels, exactly those that occur in the data. Default: those of the data."""
    by: Literal["writing", "likelihood"] = "writing"
    """`writing`: the model generates the label. `likelihood`: the label it finds most likely."""

    @model_validator(mode="after")
    def two_labels_at_least(self) -> Self:
        if len(self.labels) == 1:
            raise ValueError("one label leaves nothing to choose; add the others to labels")
        return self


class ChoiceTask(NamedTask):
    """Multiple choice: the answer is the choice with the highest likelihood for its length."""

    kind: Literal["choice"]
    data: RecipeFile
    """Rows with a question, its choices (a list, or columns A, B, C, D) and the correct one: its
    index from 0, its letter or its text."""
    question: str = "question"
    """Column with the question."""
    choices: str | Words = "choices"
    """Column with the list of choices, or a list of columns with one choice each."""
    answer: str = "answer"
    """Column with the correct choice."""


class PreferenceTask(NamedTask):
    """Pairs of answers: does the model find the better one likelier, and more so than its base?"""

    kind: Literal["preference"]
    data: RecipeFile
    """Pairs that were not learned, in any format of a preference run."""


class RewardTask(WritingTask):
    """Answers, scored by a reward model: do they score higher than those of the base?"""

    kind: Literal["reward"]
    reward_model: RecipePlace
    """The folder of a reward model: `model` in the folder of a run with `train.stage: reward`, or
    any classifier of transformers with one label."""


class PerplexityTask(NamedTask):
    """Perplexity of texts, or of the answers in conversations."""

    kind: Literal["perplexity"]
    data: RecipeFile
    """Texts, or rows in any conversation format, where only the last assistant turn counts."""
    window: int = Field(1024, ge=2)
    """Longer texts are measured in windows of this many tokens."""


class RegexForm(Section):
    """The whole answer matches a regular expression."""

    kind: Literal["regex"]
    pattern: Pattern
    """In Python's `re` syntax; a dot also matches a newline."""


class JsonForm(Section):
    """The whole answer is JSON, and matches a JSON Schema if one is given."""

    kind: Literal["json"]
    json_schema: RecipeFile | None = None
    """A file with a JSON Schema."""


Form = Annotated[RegexForm | JsonForm, Field(discriminator="kind")]


class FormatTask(WritingTask):
    """Share of answers in a required format; the rows need no reference."""

    kind: Literal["format"]
    form: Form
    """The required format of an answer."""


class Rule(Section):
    """A regular expression that must, or must not, match somewhere in an answer."""

    name: str = Field(min_length=1)
    """Name in tables and reports."""
    must_match: Pattern | None = None
    """A pattern that must occur in a correct answer."""
    must_not_match: Pattern | None = None
    """Instead of must_match: a pattern that must not occur in a correct answer."""

    @model_validator(mode="after")
    def one_of_both(self) -> Self:
        if (self.must_match is None) == (self.must_not_match is None):
            raise ValueError(
                "needs exactly one of must_match and must_not_match; write two rules to use both"
            )
        return self


class RuleTask(WritingTask):
    """Share of answers that follow given rules; the rows need no reference."""

    kind: Literal["judge_by_rule"]
    rules: list[Rule] = Field(min_length=1)
    """Each rule is reported on its own; an answer is correct if it follows all of them."""

    @model_validator(mode="after")
    def rules_have_unique_names(self) -> Self:
        check_names([rule.name for rule in self.rules], "rules")
        return self


class QualityTask(WritingTask):
    """Text quality of answers: repetition, diversity, density, length; needs no reference."""

    kind: Literal["quality"]
    side: Side = "quality"
    """`domain`: what to learn. `general`: what not to forget. `quality`: how the text reads."""
    max_new_tokens: int = Field(256, ge=1)
    """Maximum length of an answer in tokens. Short answers reveal little repetition."""


class HarnessTask(NamedTask):
    """Tasks of lm-evaluation-harness; install it with `pip install yrunner[harness]`."""

    kind: Literal["harness"]
    tasks: Words = Field(min_length=1)
    """Task names in the harness."""
    include: RecipePlace | None = None
    """A folder with your own tasks, in the harness's YAML format."""
    num_fewshot: int | None = Field(None, ge=0)
    """Number of examples before each question. Default: that of the task."""
    limit: int | None = Field(None, ge=1)
    """Maximum number of questions per task."""
    chat_template: bool = True
    """Format questions with the model's chat template."""


Task = Annotated[
    AnswerTask
    | ClassifyTask
    | ChoiceTask
    | PreferenceTask
    | RewardTask
    | PerplexityTask
    | FormatTask
    | RuleTask
    | QualityTask
    | HarnessTask,
    Field(discriminator="kind"),
]


class FaultList(Section):
    """Training rows known to be wrong: measures how many of them the model repeats."""

    data: RecipeFile
    """The training file."""
    list: RecipeFile
    """A jsonl file with the `row` number, from 1, of each faulty row of `data`; optionally `right`,
    the correct answer, and `kind`, a name for the type of fault."""
    max_new_tokens: int = Field(128, ge=1)
    """Maximum length of an answer in tokens; must exceed that of the faulty answers."""


class EvalSection(Section):
    """What to measure in the base and in the trained model."""

    tasks: list[Task] = Field([])
    batch_size: int = Field(64, ge=1)
    """Questions answered at once. In float32 it does not change the answers."""
    generation: Generation = GreedyWriting()
    """How `yrun eval` and `yrun chat` generate answers. `yrun train` always takes the most likely
    token."""
    thinking: Literal["apart", "counts"] = "apart"
    """What a model thinks before it answers. `apart`: only what comes behind it is the answer, and
    an answer whose thinking never ends is wrong. `counts`: thinking is a part of the answer."""
    budget: float | None = Field(0.05, gt=0, le=1)
    """Share of the training time that `yrun train` may spend on measuring losses and answers before
    and after it; it measures a sample if all rows and questions take longer. null: no limit.
    `yrun eval` always measures everything."""
    faults: FaultList | None = None
    """Measure memorised faults."""

    @model_validator(mode="after")
    def tasks_have_unique_names(self) -> Self:
        check_names([task.name for task in self.tasks], "tasks")
        return self


def check_names(names: Sequence[str], what: str) -> None:
    """Raise `ValueError` if two have the same name, as reports could not tell them apart."""
    double = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if double is not None:
        raise ValueError(f'two {what} have the name "{double}"; rename one')
