"""Score written answers: against a reference, a label, a form or rules, or by how they read."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean, median
from typing import Any, assert_never

from jsonschema import Draft202012Validator, SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for

from yrunner.data.text_metrics import (
    answer_figure,
    answer_figures,
    contains,
    is_exact,
    text_quality,
    units_of,
)
from yrunner.errors import DataError
from yrunner.evaluation.generate import Generated
from yrunner.evaluation.questions import Question
from yrunner.evaluation.results import by_figure, mean_figures
from yrunner.recipe.schema.eval import (
    AnswerTask,
    Form,
    FormatTask,
    JsonForm,
    QualityTask,
    RegexForm,
    Rule,
    RuleTask,
)
from yrunner.text_files import read_json

ScoredTask = AnswerTask | FormatTask | RuleTask | QualityTask
"""Tasks that score each written answer alone."""
Scorer = Callable[[Question, Generated], dict[str, float]]

ALL_RULES = "all rules"
SHORT = 10
"""Units of a reference up to which an answer can be expected to match it exactly."""
NO_LABEL = ""
"""The label of an answer that names none, or several."""


def headline_of(task: ScoredTask, references: Sequence[str]) -> str:
    """The main figure of a task; more is better. It depends on the references, not on a model."""
    match task:
        case AnswerTask():
            lengths = [len(units_of(reference)) for reference in references]
            return task.headline or ("exact" if median(lengths) <= SHORT else "rouge_l")
        case FormatTask():
            return "valid"
        case RuleTask():
            return ALL_RULES
        case QualityTask():
            return "unrepeated"
        case _:
            assert_never(task)


def scorer_of(task: ScoredTask) -> Scorer:
    """The figures of one answer. Raises `DataError` where a JSON Schema cannot be used."""
    match task:
        case AnswerTask():
            return lambda question, answer: answer_figures(answer.text, question.reference)
        case FormatTask():
            is_valid = form_check(task.form)
            return lambda _, answer: {"valid": float(is_valid(answer.text))}
        case RuleTask():
            return lambda _, answer: rule_figures(answer.text, task.rules)
        case QualityTask():
            return lambda _, answer: _with_headline(_quality(answer))
        case _:
            assert_never(task)


def quality_of(answers: Sequence[Generated]) -> dict[str, float]:
    """How the answers read, as means over them; empty where there are none."""
    return mean_figures(by_figure([_quality(answer) for answer in answers]))


def _quality(answer: Generated) -> dict[str, float]:
    return {**text_quality(answer.text), "never_stopped": float(not answer.stopped)}


def _with_headline(quality: dict[str, float]) -> dict[str, float]:
    return {"unrepeated": 1 - quality["repetition_4"], **quality}


def rule_figures(answer: str, rules: Sequence[Rule]) -> dict[str, float]:
    """1 for each rule that the answer follows and 0 for the others, by name; first, for all."""
    followed = {rule.name: float(_follows(answer, rule)) for rule in rules}
    return {ALL_RULES: float(all(followed.values())), **followed}


def _follows(text: str, rule: Rule) -> bool:
    if rule.must_match is not None:
        return re.search(rule.must_match, text) is not None
    assert rule.must_not_match is not None, "the schema wants one of the two"
    return re.search(rule.must_not_match, text) is None


def form_check(form: Form) -> Callable[[str], bool]:
    """Whether an answer, without outer blanks, has the form.

    Raises `DataError` where its JSON Schema cannot be used.
    """
    match form:
        case RegexForm():
            pattern = re.compile(form.pattern, re.DOTALL)
            return lambda answer: pattern.fullmatch(answer.strip()) is not None
        case JsonForm():
            return partial(_is_json, validator=_validator(form))
        case _:
            assert_never(form)


def _is_json(answer: str, validator: Validator | None) -> bool:
    try:
        value = json.loads(answer, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return validator is None or bool(validator.is_valid(value))


def _refuse_constant(name: str) -> Any:
    # Python reads NaN and Infinity; other readers of JSON do not.
    raise ValueError(f"{name} is not JSON")


def _validator(form: JsonForm) -> Validator | None:
    if form.json_schema is None:
        return None
    schema = read_json(form.json_schema)
    try:
        kind = validator_for(schema, Draft202012Validator)
        kind.check_schema(schema)
    except SchemaError as error:
        raise DataError(
            form.json_schema, f"is not a JSON Schema: {error.message}", remedy="correct the schema"
        ) from error
    return kind(schema)


def labels_of(wanted: Sequence[str], questions: Sequence[Question]) -> list[str]:
    """The labels of a task: `wanted`, or else those of the questions, sorted."""
    return list(wanted) or sorted({question.reference.strip() for question in questions})


def check_labels(wanted: Sequence[str], questions: Sequence[Question]) -> None:
    """Raise `DataError` where the labels of the data are not those that are wanted, or only one."""
    labels = labels_of(wanted, questions)
    for question in questions:
        if question.reference.strip() not in labels:
            listed = ", ".join(f'"{label}"' for label in labels)
            raise DataError(
                question.origin,
                f'label "{question.reference.strip()}" is not one of {listed}',
                remedy="correct the row, or add its label to labels",
            )
    file = questions[0].origin.file
    seen = {question.reference.strip() for question in questions}
    for label in labels:
        if label not in seen:
            raise DataError(
                file,
                f'no row has the label "{label}"',
                remedy="correct its spelling, or remove it from labels",
            )
    if len(labels) < 2:
        raise DataError(
            file,
            f'every row has the label "{labels[0]}"; classification needs two or more',
            remedy="add rows with other labels",
        )


def find_label(answer: str, labels: Sequence[str]) -> str:
    """The label that the answer is; else the only one that it names; else `NO_LABEL`.

    A label inside a longer one that is named ("legal" in "not legal") does not count.
    """
    exact = [label for label in labels if is_exact(answer, label)]
    if exact:
        return exact[0]
    named = [label for label in labels if contains(answer, label)]
    longest = [
        label
        for label in named
        if not any(label != other and contains(other, label) for other in named)
    ]
    return longest[0] if len(longest) == 1 else NO_LABEL


def confusion(
    labels: Sequence[str], references: Sequence[str], answers: Sequence[str]
) -> list[list[int]]:
    """How often each label (row) was answered by each label (column); last column: by none."""
    counts = Counter(zip(references, answers, strict=True))
    return [[counts[right, given] for given in (*labels, NO_LABEL)] for right in labels]


def macro_f1(references: Sequence[str], answers: Sequence[str]) -> float:
    """The unweighted mean of the labels' F1: a rare label counts as much as a frequent one."""
    scores = []
    for label in sorted(set(references)):
        hits = sum(
            right == given == label for right, given in zip(references, answers, strict=True)
        )
        scores.append(2 * hits / (references.count(label) + answers.count(label)))
    return fmean(scores)


@dataclass(frozen=True)
class Answered:
    """A question with a model's answer."""

    question: str
    reference: str
    answer: str

    @property
    def is_right(self) -> bool:
        """Whether the answer equals the reference, except for case and punctuation."""
        return bool(self.score("exact"))

    def score(self, figure: str) -> float:
        """One of `ANSWER_FIGURES`."""
        return answer_figure(figure, self.answer, self.reference)

    def as_json(self) -> dict[str, Any]:
        """For `before.json` and `after.json`."""
        return {**asdict(self), "right": self.is_right}


def mean_score(answered: Sequence[Answered], figure: str) -> float:
    """The mean of a figure over the answers."""
    return fmean(row.score(figure) for row in answered)
