"""Every kind of task: read its questions, and run it on a model."""

# N = tokens of a reply

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import assert_never

import torch
from torch import Tensor

from yrunner.data.conversation import Conversation, Message
from yrunner.data.text_metrics import pieces_of
from yrunner.evaluation.evaluated_model import EvaluatedModel
from yrunner.evaluation.generate import Generated
from yrunner.evaluation.harness import check_harness, harness_key, run_harness
from yrunner.evaluation.questions import (
    Question,
    read_choices,
    read_pairs,
    read_prompts,
    read_questions,
    read_texts,
)
from yrunner.evaluation.results import TaskResult, by_figure, mean_figures
from yrunner.evaluation.scorers import (
    NO_LABEL,
    ScoredTask,
    check_labels,
    find_label,
    form_check,
    headline_of,
    labels_of,
    macro_f1,
    scorer_of,
)
from yrunner.models.model_key import model_key
from yrunner.recipe.schema.eval import (
    AnswerTask,
    ChoiceTask,
    ClassifyTask,
    FormatTask,
    HarnessTask,
    PerplexityTask,
    PreferenceTask,
    QualityTask,
    RewardTask,
    RuleTask,
    Task,
)
from yrunner.scoring.reward_model import RewardModel, check_reward_model

LOWEST = -1e30
"""In place of the score of an answer that has none."""


def read_task(task: Task, *, thinking_apart: bool = True) -> list[Question]:
    """The questions of a task; none for the harness, which brings its own.

    `thinking_apart`: a reference is what comes behind its thinking. Raises `DataError` for data
    that cannot be asked, before a model is loaded.
    """
    match task:
        case AnswerTask():
            return _references(read_questions(task.data), apart=thinking_apart)
        case ClassifyTask():
            questions = _references(read_questions(task.data), apart=thinking_apart)
            check_labels(task.labels, questions)
            return questions
        case ChoiceTask():
            return read_choices(
                task.data, question=task.question, choices=task.choices, answer=task.answer
            )
        case PreferenceTask():
            return read_pairs(task.data)
        case RewardTask():
            check_reward_model(task.reward_model)
            return read_prompts(task.data)
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


def _references(questions: Sequence[Question], *, apart: bool) -> list[Question]:
    return [question.behind_thinking() if apart else question for question in questions]


def run_task(task: Task, questions: Sequence[Question], model: EvaluatedModel) -> TaskResult:
    """What a model reaches in a task; `questions` are those that `read_task` gave."""
    match task:
        case AnswerTask() | FormatTask() | RuleTask() | QualityTask():
            return _score_answers(task, questions, model)
        case ClassifyTask():
            return _classify(task, questions, model)
        case ChoiceTask():
            return _choose(task, questions, model)
        case PreferenceTask():
            return _prefer(task, questions, model)
        case RewardTask():
            return _reward(task, questions, model)
        case PerplexityTask():
            return _perplexity(task, questions, model)
        case HarnessTask():
            depends_on = harness_key(task, model)
            return TaskResult(**model.recall(depends_on, lambda: asdict(run_harness(task, model))))
        case _:
            assert_never(task)


def _score_answers(
    task: ScoredTask, questions: Sequence[Question], model: EvaluatedModel
) -> TaskResult:
    """Let the model write, and score each answer; a question it cannot be asked scores 0."""
    scorer = scorer_of(task)
    answers = model.answer(questions, task.max_new_tokens)
    rows = []
    for question, answer in zip(questions, answers, strict=True):
        figures = scorer(question, answer)
        rows.append(dict.fromkeys(figures, 0.0) if answer.refused else figures)
    per_question = by_figure(rows) | _beside_base(task, questions, answers, model)
    return TaskResult(
        side=task.side,
        kind=task.kind,
        headline=headline_of(task, [question.reference for question in questions]),
        figures=mean_figures(per_question),
        per_question=per_question,
        answers=[answer.text for answer in answers],
        refused=sum(answer.refused for answer in answers),
        unfinished=sum(answer.unfinished for answer in answers),
    )


def _beside_base(
    task: ScoredTask | ClassifyTask,
    questions: Sequence[Question],
    answers: Sequence[Generated],
    model: EvaluatedModel,
) -> dict[str, list[float]]:
    """On the general side, what shows a change that no reference tells.

    `length` of each answer; `kl`, the distance from the base in nats per token, over each answer of
    the base.
    """
    if task.side != "general":
        return {}
    found = {"length": [float(len(pieces_of(answer.text))) for answer in answers]}
    divergences = model.divergences(questions, task.max_new_tokens)
    if divergences is not None:
        # Rounding can make a divergence of zero slightly negative.
        found["kl"] = [max(0.0, float(kl_N.double().mean())) for kl_N in divergences]
    return found


def _classify(
    task: ClassifyTask, questions: Sequence[Question], model: EvaluatedModel
) -> TaskResult:
    """The label that the model writes, or the likeliest one, end mark included."""
    labels = labels_of(task.labels, questions)
    if task.by == "likelihood":
        costs = model.reply_costs(questions, [labels] * len(questions))
        taken = [_cheapest(labels, row) for row in costs]
        refused, unfinished, beside = costs.count(None), 0, {}
    else:
        answers = model.answer(questions, task.max_new_tokens)
        taken = [find_label(answer.text, labels) for answer in answers]
        refused = sum(answer.refused for answer in answers)
        unfinished = sum(answer.unfinished for answer in answers)
        beside = _beside_base(task, questions, answers, model)
    references = [question.reference.strip() for question in questions]
    per_question = {"accuracy": _hits(references, taken), **beside}
    return TaskResult(
        side=task.side,
        kind=task.kind,
        headline="accuracy",
        figures={**mean_figures(per_question), "macro_f1": macro_f1(references, taken)},
        per_question=per_question,
        answers=taken,
        refused=refused,
        unfinished=unfinished,
    )


def _choose(task: ChoiceTask, questions: Sequence[Question], model: EvaluatedModel) -> TaskResult:
    """Take the choice that is likeliest per character: long ones are unlikely as a whole.

    `unnormalised` is the accuracy of taking the likeliest as a whole. lm-evaluation-harness calls
    the two `acc_norm` and `acc`.
    """
    costs = model.reply_costs(questions, [question.choices for question in questions])
    taken, whole = [], []
    for question, row in zip(questions, costs, strict=True):
        per_character = row and [
            cost / len(text) for cost, text in zip(row, question.choices, strict=True)
        ]
        taken.append(_cheapest(question.choices, per_character))
        whole.append(_cheapest(question.choices, row))
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


def _prefer(
    task: PreferenceTask, questions: Sequence[Question], model: EvaluatedModel
) -> TaskResult:
    """Whether the better answer is likelier, as a whole, and by how much.

    `margin` is in nats. Beside a base, the reward of an answer is its log-likelihood minus the
    base's: `reward_accuracy` and `reward_margin` compare these. A draw counts half; a pair that is
    too long loses, with a margin of 0.
    """
    margins = _margins(questions, model)
    per_question = {"accuracy": [_win(margin) for margin in margins]}
    per_question["margin"] = [margin or 0.0 for margin in margins]
    if model.base is not None:
        before = _margins(questions, model.base)
        rewards = [
            None if now is None or then is None else now - then
            for now, then in zip(margins, before, strict=True)
        ]
        per_question["reward_accuracy"] = [_win(reward) for reward in rewards]
        per_question["reward_margin"] = [reward or 0.0 for reward in rewards]
    return TaskResult(
        side=task.side,
        kind=task.kind,
        headline="accuracy",
        figures=mean_figures(per_question),
        per_question=per_question,
        refused=margins.count(None),
    )


def _margins(questions: Sequence[Question], model: EvaluatedModel) -> list[float | None]:
    """Log-likelihood of the better answer minus that of the worse one; None for a long pair."""
    costs = model.reply_costs(questions, [question.choices for question in questions])
    return [None if row is None else row[1] - row[0] for row in costs]


def _win(margin: float | None) -> float:
    return 0.0 if margin is None or margin < 0 else 0.5 if margin == 0 else 1.0


def _reward(task: RewardTask, questions: Sequence[Question], model: EvaluatedModel) -> TaskResult:
    """Mean score of the answers, and how often it is above that of the base's answer.

    `wins`: a draw counts half; one half for the base itself. An answer without a score, empty or
    too long for the reward model, loses, and counts as the lowest of the others in `reward`.
    """
    answers, scores = _scored_answers(task, questions, model)
    theirs = scores
    if model.base is not None:
        _, theirs = _scored_answers(task, questions, model.base)
    lowest = min((score for score in scores if score is not None), default=0.0)
    pairs = zip(scores, theirs, strict=True)
    per_question = {
        "wins": [_win(_or(LOWEST, own) - _or(LOWEST, other)) for own, other in pairs],
        "reward": [_or(lowest, score) for score in scores],
    }
    return TaskResult(
        side=task.side,
        kind=task.kind,
        headline="wins",
        figures=mean_figures(per_question),
        per_question=per_question,
        answers=[answer.text for answer in answers],
        refused=scores.count(None),
        unfinished=sum(answer.unfinished for answer in answers),
    )


@lru_cache(maxsize=1)
def _reward_model(folder: Path) -> RewardModel:
    """Kept, because several models are evaluated one after the other."""
    return RewardModel(folder)


def _scored_answers(
    task: RewardTask, questions: Sequence[Question], model: EvaluatedModel
) -> tuple[list[Generated], list[float | None]]:
    answers = model.answer(questions, task.max_new_tokens)
    texts = [answer.text for answer in answers]

    def measure() -> list[float | None]:
        conversations = [
            Conversation((*question.messages, Message("assistant", text)), question.origin)
            for question, text in zip(questions, texts, strict=True)
        ]
        return _reward_model(task.reward_model).score(
            conversations, system=model.system, batch_size=model.batch_size
        )

    # The base's answers are compared with those of every other model.
    depends_on = {
        "rewards": texts,
        "questions": [[asdict(turn) for turn in question.messages] for question in questions],
        "system": model.system,
        "reward_model": model_key(task.reward_model),
    }
    return answers, model.recall(depends_on, measure)


def _or(lowest: float, score: float | None) -> float:
    return lowest if score is None else score


def _perplexity(
    task: PerplexityTask, questions: Sequence[Question], model: EvaluatedModel
) -> TaskResult:
    """How well the model predicts each text or answer.

    `probability`, e to the minus mean loss of a row, is the geometric mean probability of its
    tokens; 0 for a row that is too long. `loss` is in nats per token; `perplexity` is of all tokens
    together.
    """
    replies = [question.reference for question in questions]
    losses = model.losses(questions, replies, task.window)
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


def _cheapest(texts: Sequence[str], costs: Sequence[float] | None) -> str:
    if costs is None:
        return NO_LABEL
    return min(zip(costs, texts, strict=True), key=lambda pair: pair[0])[1]


def _hits(references: Sequence[str], taken: Sequence[str]) -> list[float]:
    return [float(right == given) for right, given in zip(references, taken, strict=True)]


def _probability(loss_N: Tensor | None) -> float:
    return 0.0 if loss_N is None or not len(loss_N) else math.exp(-float(loss_N.double().mean()))
