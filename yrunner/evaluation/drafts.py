"""A model writes conversations of its own: it is led to the place where a question begins.

A chat model gets the opening of a user turn in its own template, invents the question, and answers
it. A model without a template goes on from the mark that its texts begin with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from yrunner.data.conversation import Message
from yrunner.data.render import prompt_text
from yrunner.evaluation.generate import Generated, generate_answers
from yrunner.recipe.schema_eval import SampleWriting

PLACEHOLDER = "placeholder"
"""A question that no template changes, to see what it is put between."""


@dataclass(frozen=True)
class Draft:
    """What a model wrote."""

    number: int
    messages: tuple[Message, ...]
    finished: bool
    """False where a turn was cut off, or no turn could begin."""

    @property
    def text(self) -> str:
        """All that was said, without the template."""
        return "\n".join(message.content for message in self.messages)


@dataclass(frozen=True)
class Author:
    """A model that writes, and how."""

    model: Any
    tokenizer: Any
    system: str | None
    temperature: float
    openings: Sequence[str]
    """First words of the questions, taken in turns."""
    max_new_tokens: int
    batch_size: int

    def write(self, numbers: Sequence[int]) -> list[Draft]:
        """A draft for each number, which alone decides what is drawn for it."""
        if self.tokenizer.chat_template is None:
            begin = self.tokenizer.bos_token or self.tokenizer.eos_token or ""
            texts = self._begin(begin, numbers)
            return [
                Draft(number, (Message("text", text),), finished)
                for number, (text, finished) in zip(numbers, texts, strict=True)
            ]
        return self._converse(numbers)

    def _converse(self, numbers: Sequence[int]) -> list[Draft]:
        begin, _ = self._around_a_question
        begun = self._begin(begin, numbers)
        questions = {
            number: (self._cut(text), finished or self._marked(text))
            for number, (text, finished) in zip(numbers, begun, strict=True)
        }
        asked = [number for number in numbers if questions[number][1] and questions[number][0]]
        prompts = [
            prompt_text([Message("user", questions[number][0])], self.tokenizer, self.system)
            for number in asked
        ]
        written = self._continue(prompts, asked, 1)
        answers = {
            number: (answer.text, answer.stopped)
            for number, answer in zip(asked, written, strict=True)
        }
        return [
            Draft(
                number,
                (
                    Message("user", questions[number][0]),
                    Message("assistant", answers.get(number, ("", False))[0]),
                ),
                answers.get(number, ("", False))[1],
            )
            for number in numbers
        ]

    def _begin(self, begin: str, numbers: Sequence[int]) -> list[tuple[str, bool]]:
        """The first turn of each draft, and whether it came to an end."""
        openings = [self._opening(number) for number in numbers]
        written = self._continue([begin + opening for opening in openings], numbers, 0)
        return [
            (opening + " " * (bool(opening) and turn.began_with_blank) + turn.text, turn.stopped)
            for opening, turn in zip(openings, written, strict=True)
        ]

    def _continue(
        self, prompts: Sequence[str], numbers: Sequence[int], turn: int
    ) -> list[Generated]:
        """What is written behind each prompt."""
        return generate_answers(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            generation=SampleWriting(kind="sample", temperature=self.temperature),
            seed=turn,
            numbers=numbers,
            also_stop_at=self._turn_end_ids,
        )

    def _opening(self, number: int) -> str:
        return self.openings[number % len(self.openings)] if self.openings else ""

    @cached_property
    def _around_a_question(self) -> tuple[str, str]:
        """What the template writes before and behind a question."""
        text = prompt_text([Message("user", PLACEHOLDER)], self.tokenizer, self.system)
        begin, _, end = text.rpartition(PLACEHOLDER)
        # A blank at the end of a prompt would be a token that the model has never seen there.
        return begin.rstrip(" "), end

    @cached_property
    def _turn_end_ids(self) -> list[int]:
        """The mark behind a question, where it is a token of its own."""
        if self.tokenizer.chat_template is None:
            return []
        ids = self.tokenizer(self._around_a_question[1], add_special_tokens=False)["input_ids"]
        marks = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        return [token for token in ids[:1] if token in marks]

    def _cut(self, question: str) -> str:
        """The question up to a mark that is written in plain text, such as [/INST]."""
        mark = self._plain_mark
        return (question.partition(mark)[0] if mark else question).strip()

    def _marked(self, question: str) -> bool:
        return bool(self._plain_mark) and self._plain_mark in question

    @cached_property
    def _plain_mark(self) -> str:
        if self._turn_end_ids:
            return ""
        lines = self._around_a_question[1].strip().splitlines()
        return lines[0].strip() if lines else ""
