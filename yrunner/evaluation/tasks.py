"""Questions with a reference answer, and how a model did on them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yrunner.data.conversation import Conversation, Message
from yrunner.data.reading import read_conversations
from yrunner.data.refusals import Refusal
from yrunner.data.render import prompt_text
from yrunner.data.spans import THINK_CLOSE
from yrunner.errors import DataError
from yrunner.evaluation.generate import Advance, generate_answers


@dataclass(frozen=True)
class Question:
    """What is asked (and all that was said before), and the answer that is right."""

    messages: tuple[Message, ...]
    reference: str

    @property
    def text(self) -> str:
        """The last thing that was said, for tables."""
        return self.messages[-1].content


@dataclass(frozen=True)
class Answered:
    """A question with the answer that a model gave."""

    question: str
    reference: str
    answer: str

    @property
    def is_right(self) -> bool:
        """Exactly the reference, but for blanks around it and for thinking before it."""
        return _without_thinking(self.answer) == _without_thinking(self.reference)

    def as_json(self) -> dict[str, Any]:
        """For `answers.json`."""
        return {**asdict(self), "right": self.is_right}


def read_questions(file: Path) -> list[Question]:
    """The conversations of a file as questions. Raises `DataError` at the first faulty row."""
    questions = []
    for row in read_conversations(file).rows:
        if isinstance(row, Refusal):
            raise DataError(row.origin, row.reason, remedy="mend the row; every question counts")
        if row.is_text:
            raise DataError(row.origin, "is a plain text, not a question with an answer")
        questions.append(question_of(row))
    return questions


def question_of(conversation: Conversation) -> Question:
    """The last assistant turn is the reference, everything before it is the question."""
    *messages, reply = conversation.messages
    return Question(tuple(messages), reply.content)


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
    """Let the model answer each question, in order."""
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
        Answered(question.text, question.reference, answer)
        for question, answer in zip(questions, answers, strict=True)
    ]


def _without_thinking(text: str) -> str:
    return text.rpartition(THINK_CLOSE)[2].strip()


def share_right(answered: Sequence[Answered]) -> float:
    """Share of the questions that were answered exactly."""
    return sum(row.is_right for row in answered) / len(answered)
