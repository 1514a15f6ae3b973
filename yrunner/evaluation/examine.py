"""Every kind of task: how its questions are read, and how a model is examined in it."""

from collections.abc import Sequence
from typing import assert_never

from yrunner.evaluation.candidate import Candidate
from yrunner.evaluation.choices import read_choices
from yrunner.evaluation.classification import check_labels, find_label, labels_of, macro_f1
from yrunner.evaluation.forms import form_check
from yrunner.evaluation.harness import check_harness, run_harness
from yrunner.evaluation.judging import examine_writing
from yrunner.evaluation.likelihood import (
    cheapest,
    examine_choices,
    examine_perplexity,
    reply_costs,
)
from yrunner.evaluation.questions import Question, read_prompts, read_questions, read_texts
from yrunner.evaluation.results import TaskResult, mean_figures
from yrunner.recipe.schema_eval import (
    AnswerTask,
    ChoiceTask,
    ClassifyTask,
    FormatTask,
    HarnessTask,
    PerplexityTask,
    QualityTask,
    RuleTask,
    Task,
)


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
