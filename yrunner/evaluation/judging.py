"""What written answers are judged by: a reference, a form, rules, or how they read."""

from collections.abc import Callable, Sequence
from typing import assert_never

from yrunner.evaluation.candidate import Candidate
from yrunner.evaluation.forms import ALL_RULES, form_check, kept_rules
from yrunner.evaluation.generate import Generated
from yrunner.evaluation.questions import Question
from yrunner.evaluation.results import TaskResult, by_figure, mean_figures
from yrunner.evaluation.text_metrics import answer_figures
from yrunner.evaluation.text_quality import text_quality
from yrunner.recipe.schema_eval import AnswerTask, FormatTask, QualityTask, RuleTask

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
