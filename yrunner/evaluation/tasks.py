"""Answers that are one of a few labels: which one was given, and how often the right one.

Every kind of task: how its questions are read, and how a model is examined in it.

Whether an answer has a form: a regular expression, JSON, a JSON Schema, or its own rules.

What written answers are judged by: a reference, a form, rules, or how they read.

Tasks that a model only reads: which of several replies, or how well it foresees a text.
"""

# N = tokens of a reply

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any, assert_never

import torch
from jsonschema import Draft202012Validator, SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from torch import Tensor

from yrunner.errors import DataError
from yrunner.evaluation.candidate import Candidate
from yrunner.evaluation.generate import Generated
from yrunner.evaluation.harness import check_harness, run_harness
from yrunner.evaluation.questions import (
    Question,
    read_choices,
    read_prompts,
    read_questions,
    read_texts,
)
from yrunner.evaluation.results import TaskResult, by_figure, mean_figures
from yrunner.evaluation.text_metrics import (
    answer_figures,
    contains,
    is_exact,
    text_quality,
    without_thinking,
)
from yrunner.recipe.schema.eval import (
    AnswerTask,
    ChoiceTask,
    ClassifyTask,
    Form,
    FormatTask,
    HarnessTask,
    JsonForm,
    PerplexityTask,
    QualityTask,
    RegexForm,
    Rule,
    RuleTask,
    Task,
)

NO_LABEL = ""
"""For an answer that names no label, or several."""


def labels_of(wanted: Sequence[str], questions: Sequence[Question]) -> list[str]:
    """The labels of a task: `wanted`, or else those of the questions, in order of their text."""
    return list(wanted) or sorted({question.reference.strip() for question in questions})


def check_labels(wanted: Sequence[str], questions: Sequence[Question]) -> None:
    """Raise `DataError` where the data has a label that was not listed, or lacks one that was."""
    labels = labels_of(wanted, questions)
    for question in questions:
        if question.reference.strip() not in labels:
            listed = ", ".join(f'"{label}"' for label in labels)
            raise DataError(
                question.origin,
                f'has the label "{question.reference.strip()}", the task knows only {listed}',
                remedy="correct the row, or add it to labels",
            )
    seen = {question.reference.strip() for question in questions}
    for label in labels:
        if label not in seen:
            raise DataError(
                questions[0].origin.file,
                f'no row has the label "{label}" of the task',
                remedy="correct its spelling, or take it out of labels",
            )
    if len(labels) < 2:
        raise DataError(
            questions[0].origin.file,
            f'every row has the label "{labels[0]}", which leaves nothing to choose',
            remedy="add rows with other labels",
        )


def find_label(answer: str, labels: Sequence[str]) -> str:
    """The label that the answer is; else the only one that it names; else `NO_LABEL`.

    A label inside a longer one that is named ("legal" in "not legal") does not count.
    """
    answer = without_thinking(answer)
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
    labels: Sequence[str], references: Sequence[str], taken: Sequence[str]
) -> list[list[int]]:
    """How often each label (row) was answered by each label (column); last column: by none."""
    counts = Counter(zip(references, taken, strict=True))
    return [[counts[right, given] for given in (*labels, NO_LABEL)] for right in labels]


def macro_f1(references: Sequence[str], taken: Sequence[str]) -> float:
    """The mean of the labels' F1, each label counting alike, however rare it is."""
    scores = []
    for label in sorted(set(references)):
        hits = sum(right == given == label for right, given in zip(references, taken, strict=True))
        scores.append(2 * hits / (references.count(label) + taken.count(label)))
    return fmean(scores)


ALL_RULES = "all rules"

Check = Callable[[str], bool]
"""Whether an answer, without thinking and outer blanks, is valid."""


def form_check(form: Form) -> Check:
    """The check of a form. Raises `DataError` where its JSON Schema cannot be used."""
    match form:
        case RegexForm():
            pattern = re.compile(form.pattern, re.DOTALL)
            return lambda answer: pattern.fullmatch(without_thinking(answer)) is not None
        case JsonForm():
            return partial(_is_json, validator=_validator(form))
        case _:
            assert_never(form)


def kept_rules(answer: str, rules: Sequence[Rule]) -> dict[str, float]:
    """1 for each rule that the answer keeps, by its name, and 0 for the others; first, for all."""
    text = without_thinking(answer)
    kept = {rule.name: float(_keeps(text, rule)) for rule in rules}
    return {ALL_RULES: float(all(kept.values())), **kept}


def _keeps(text: str, rule: Rule) -> bool:
    if rule.must_match is not None:
        return re.search(rule.must_match, text) is not None
    assert rule.must_not_match is not None, "the schema wants one of the two"
    return re.search(rule.must_not_match, text) is None


def _is_json(answer: str, validator: Validator | None) -> bool:
    try:
        value = json.loads(without_thinking(answer), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return validator is None or bool(validator.is_valid(value))


def _refuse_constant(name: str) -> Any:
    # Python reads NaN and Infinity, which no other reader of JSON does.
    raise ValueError(f"{name} is no JSON")


def _validator(form: JsonForm) -> Validator | None:
    if form.json_schema is None:
        return None
    try:
        schema = json.loads(form.json_schema.read_text("utf-8"))
        kind = validator_for(schema, Draft202012Validator)
        kind.check_schema(schema)
    except (ValueError, SchemaError) as error:
        reason = error.message if isinstance(error, SchemaError) else str(error)
        raise DataError(
            form.json_schema, f"is no JSON Schema: {reason}", remedy="correct the schema"
        ) from error
    return kind(schema)


JudgedTask = AnswerTask | FormatTask | RuleTask | QualityTask
Judge = Callable[[Question, Generated], dict[str, float]]

HEADLINES = {
    "answer": "exact",
    "format": "valid",
    "judge_by_rule": ALL_RULES,
    "quality": "unrepeated",
}
"""The main figure of each kind, of which more is better."""


def examine_writing(
    task: JudgedTask, questions: Sequence[Question], candidate: Candidate
) -> TaskResult:
    """Let the model write, and judge each answer; one that was refused reaches nothing."""
    judge = _judge_of(task)
    answers = candidate.answer(questions, task.max_new_tokens)
    rows = []
    for question, answer in zip(questions, answers, strict=True):
        figures = judge(question, answer)
        rows.append(dict.fromkeys(figures, 0.0) if answer.refused else figures)
    per_question = by_figure(rows)
    return TaskResult(
        side=task.side,
        kind=task.kind,
        headline=HEADLINES[task.kind],
        figures=mean_figures(per_question),
        per_question=per_question,
        answers=[answer.text for answer in answers],
        refused=sum(answer.refused for answer in answers),
    )


def quality_of(answers: Sequence[Generated]) -> dict[str, float]:
    """How the answers read, as means over them; nothing where there are none."""
    return mean_figures(by_figure([_quality(answer) for answer in answers]))


def _judge_of(task: JudgedTask) -> Judge:
    match task:
        case AnswerTask():
            return lambda question, answer: answer_figures(answer.text, question.reference)
        case FormatTask():
            is_valid = form_check(task.form)
            return lambda _, answer: {"valid": float(is_valid(answer.text))}
        case RuleTask():
            return lambda _, answer: kept_rules(answer.text, task.rules)
        case QualityTask():
            return lambda _, answer: _with_headline(_quality(answer))
        case _:
            assert_never(task)


def _quality(answer: Generated) -> dict[str, float]:
    return {**text_quality(answer.text), "never_stopped": float(not answer.stopped)}


def _with_headline(quality: dict[str, float]) -> dict[str, float]:
    return {"unrepeated": 1 - quality["repetition_4"], **quality}


def reply_costs(
    questions: Sequence[Question], replies: Sequence[Sequence[str]], candidate: Candidate
) -> list[list[float] | None]:
    """Minus the log-likelihood, in nats, of each reply to each question, end mark included.

    None for a question where one of them does not fit into the model.
    """
    asked = [question for question, texts in zip(questions, replies, strict=True) for _ in texts]
    losses = iter(candidate.losses(asked, [text for texts in replies for text in texts]))
    costs = [[_total(next(losses)) for _ in texts] for texts in replies]
    return [None if math.inf in row else row for row in costs]


def cheapest(texts: Sequence[str], costs: Sequence[float] | None) -> str:
    """The text that costs least; none where nothing was measured."""
    if costs is None:
        return NO_LABEL
    return min(zip(costs, texts, strict=True), key=lambda pair: pair[0])[1]


def examine_choices(
    task: ChoiceTask, questions: Sequence[Question], candidate: Candidate
) -> TaskResult:
    """Take the choice that is likeliest per character: long ones are unlikely as a whole.

    `unnormalised` is the accuracy of taking the likeliest as a whole.
    """
    costs = reply_costs(questions, [question.choices for question in questions], candidate)
    taken, whole = [], []
    for question, row in zip(questions, costs, strict=True):
        per_character = row and [
            cost / len(text) for cost, text in zip(row, question.choices, strict=True)
        ]
        taken.append(cheapest(question.choices, per_character))
        whole.append(cheapest(question.choices, row))
    references = [question.reference for question in questions]
    per_question = {
        "accuracy": _hits(references, taken),
        "unnormalised": _hits(references, whole),
    }
    return TaskResult(
        side=task.side,
        kind=task.kind,
        headline="accuracy",
        figures=mean_figures(per_question),
        per_question=per_question,
        answers=taken,
        refused=costs.count(None),
    )


def examine_perplexity(
    task: PerplexityTask, questions: Sequence[Question], candidate: Candidate
) -> TaskResult:
    """How well the model foresees each text or answer.

    `probability`, e to the minus mean loss of a row, is the geometric mean probability of its
    tokens; 0 for a row that was refused. `loss` is in nats per token; `perplexity` is of all tokens
    together.
    """
    replies = [question.reference for question in questions]
    losses = candidate.losses(questions, replies, task.window)
    read = [loss_N.double() for loss_N in losses if loss_N is not None and len(loss_N)]
    per_question = {"probability": [_probability(loss_N) for loss_N in losses]}
    figures = mean_figures(per_question)
    if read:
        per_token = float(torch.cat(read).mean())
        figures |= {"loss": per_token, "perplexity": math.exp(per_token)}
    return TaskResult(
        side=task.side,
        kind=task.kind,
        headline="probability",
        figures=figures,
        per_question=per_question,
        refused=len(losses) - len(read),
    )


def _total(loss_N: Tensor | None) -> float:
    return math.inf if loss_N is None else float(loss_N.double().sum())


def _probability(loss_N: Tensor | None) -> float:
    return 0.0 if loss_N is None or not len(loss_N) else math.exp(-float(loss_N.double().mean()))


def _hits(references: Sequence[str], taken: Sequence[str]) -> list[float]:
    return [float(right == given) for right, given in zip(references, taken, strict=True)]


def read_task(task: Task) -> list[Question]:
    """The questions of a task; the harness keeps its own.

    Raises `DataError` for data that cannot be asked, before anybody loads a model for it.
    """
    match task:
        case AnswerTask():
            return read_questions(task.data)
        case ClassifyTask():
            questions = read_questions(task.data)
            check_labels(task.labels, questions)
            return questions
        case ChoiceTask():
            return read_choices(
                task.data, question=task.question, choices=task.choices, answer=task.answer
            )
        case PerplexityTask():
            return read_texts(task.data)
        case FormatTask():
            form_check(task.form)
            return read_prompts(task.data)
        case RuleTask() | QualityTask():
            return read_prompts(task.data)
        case HarnessTask():
            check_harness(task)
            return []
        case _:
            assert_never(task)


def examine(task: Task, questions: Sequence[Question], candidate: Candidate) -> TaskResult:
    """What a model reaches in a task, whose questions were read before."""
    match task:
        case AnswerTask() | FormatTask() | RuleTask() | QualityTask():
            return examine_writing(task, questions, candidate)
        case ClassifyTask():
            return _examine_labels(task, questions, candidate)
        case ChoiceTask():
            return examine_choices(task, questions, candidate)
        case PerplexityTask():
            return examine_perplexity(task, questions, candidate)
        case HarnessTask():
            return run_harness(task, candidate)
        case _:
            assert_never(task)


def _examine_labels(
    task: ClassifyTask, questions: Sequence[Question], candidate: Candidate
) -> TaskResult:
    """The label that the model writes, or that it finds likeliest, its end mark included."""
    labels = labels_of(task.labels, questions)
    if task.by == "likelihood":
        costs = reply_costs(questions, [labels] * len(questions), candidate)
        taken = [cheapest(labels, row) for row in costs]
        refused = costs.count(None)
    else:
        answers = candidate.answer(questions, task.max_new_tokens)
        taken = [find_label(answer.text, labels) for answer in answers]
        refused = sum(answer.refused for answer in answers)
    references = [question.reference.strip() for question in questions]
    hits = [float(right == given) for right, given in zip(references, taken, strict=True)]
    return TaskResult(
        side=task.side,
        kind=task.kind,
        headline="accuracy",
        figures={**mean_figures({"accuracy": hits}), "macro_f1": macro_f1(references, taken)},
        per_question={"accuracy": hits},
        answers=taken,
        refused=refused,
    )
