"""Which drafts are of no use: cut off, empty, stuck in a loop, or said before.

A model writes conversations of its own: it is led to the place where a question begins.

A chat model gets the opening of a user turn in its own template, invents the question, and answers
it. A model without a template goes on from the mark that its texts begin with.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from yrunner.data.chat.tokenize import prompt_text
from yrunner.data.conversation import Message
from yrunner.evaluation.generate import Generated, generate_answers
from yrunner.evaluation.text_metrics import pieces_of, units_of, windowed_repetition
from yrunner.recipe.schema.eval import SampleWriting

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
class ReplayWriter:
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


ReplayFault = Literal["unfinished", "empty", "loop", "duplicate"]
FAULTS: tuple[ReplayFault, ...] = ("unfinished", "empty", "loop", "duplicate")

LOOP = 0.3
"""Windowed repetition of a text that is stuck. The highest of the rows in recipes/data is 0.2."""
ALIKE = 0.8
"""Share of the 3-grams of two texts that both have, from which on one is a copy of the other."""
SIZE = 3

Shingles = frozenset[tuple[str, ...]]


class SeenTexts:
    """The texts that were kept so far; looks for one that is nearly the same."""

    def __init__(self) -> None:
        self.shingles: list[Shingles] = []
        self.rows_with: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, text: str) -> None:
        """Remember a text."""
        shingles = shingles_of(text)
        for shingle in shingles:
            self.rows_with[shingle].append(len(self.shingles))
        self.shingles.append(shingles)

    def has(self, text: str) -> bool:
        """Whether a known text is nearly the same: of all their 3-grams, both have most."""
        shingles = shingles_of(text)
        common = Counter(row for shingle in shingles for row in self.rows_with.get(shingle, ()))
        return any(
            number >= ALIKE * (len(shingles) + len(self.shingles[row]) - number)
            for row, number in common.items()
        )


def shingles_of(text: str) -> Shingles:
    """The 3-grams of a text's words, numbers and Chinese characters; of a short one, all of it."""
    units = units_of(text) or pieces_of(text)
    places = range(max(1, len(units) - SIZE + 1))
    return frozenset(tuple(units[place : place + SIZE]) for place in places)


def find_fault(draft: Draft, known: SeenTexts) -> ReplayFault | None:
    """Why a draft is dropped; None where it can be kept."""
    if not draft.finished:
        return "unfinished"
    if not all(message.content for message in draft.messages):
        return "empty"
    if windowed_repetition(pieces_of(draft.text)) > LOOP:
        return "loop"
    return "duplicate" if known.has(draft.text) else None
