"""Tasks that a model only reads: which of several replies, or how well it foresees a text."""

# N = tokens of a reply

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from yrunner.evaluation.candidate import Candidate
from yrunner.evaluation.classification import NO_LABEL
from yrunner.evaluation.questions import Question
from yrunner.evaluation.results import TaskResult, mean_figures
from yrunner.recipe.schema_eval import ChoiceTask, PerplexityTask


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
