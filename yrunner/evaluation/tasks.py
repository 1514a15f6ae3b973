"""Questions that are answered as training goes: how many of the answers are right."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from yrunner.data.render import prompt_text
from yrunner.evaluation.generate import Advance, generate_answers
from yrunner.evaluation.questions import Question
from yrunner.evaluation.text_metrics import is_exact, without_thinking


@dataclass(frozen=True)
class Answered:
    """A question with the answer that a model gave."""

    question: str
    reference: str
    answer: str

    @property
    def is_right(self) -> bool:
        """Exactly the reference, but for ways of writing it and for thinking before it."""
        return is_exact(without_thinking(self.answer), without_thinking(self.reference))

    def as_json(self) -> dict[str, Any]:
        """For `answers.json`."""
        return {**asdict(self), "right": self.is_right}


def answer_questions(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    system: str | None,
    max_new_tokens: int,
    batch_size: int,
    advance: Advance = lambda _: None,
) -> list[Answered]:
    """Let the model answer each question by its likeliest tokens, in order."""
    prompts = [prompt_text(question.messages, tokenizer, system) for question in questions]
    answers = generate_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        advance=advance,
    )
    return [
        Answered(question.text, question.reference, answer.text)
        for question, answer in zip(questions, answers, strict=True)
    ]


def share_right(answered: Sequence[Answered]) -> float:
    """Share of the questions that were answered exactly."""
    return sum(row.is_right for row in answered) / len(answered)
