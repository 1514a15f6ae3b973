"""Self-replay: the base writes rows, and those that are not usable are found.

A chat model gets the start of a user turn in its own template, writes the question, and answers it.
A model without a template continues its start-of-text token.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from yrunner.data.chat.tokenize import Prompt, prompt_of, prompt_text
from yrunner.data.conversation import Message
from yrunner.evaluation.generate import REFUSED, Generated, generate_answers
from yrunner.evaluation.text_metrics import pieces_of, units_of, windowed_repetition
from yrunner.recipe.schema.eval import SampleWriting

ReplayFault = Literal["unfinished", "empty", "loop", "duplicate"]
FAULTS: tuple[ReplayFault, ...] = ("unfinished", "empty", "loop", "duplicate")

LOOP = 0.3
"""Windowed repetition above which a text is a loop. The highest of the rows in recipes/data is 0.2.
"""
ALIKE = 0.8
"""Share of common 3-grams from which on two texts are duplicates."""
SIZE = 3
PLACEHOLDER = "placeholder"
"""A question that no template changes: shows what the template writes around it."""

Shingles = frozenset[tuple[str, ...]]


@dataclass(frozen=True)
class ReplayRow:
    """A row that the base wrote."""

    number: int
    messages: tuple[Message, ...]
    finished: bool
    """False where a turn was cut off, or could not begin."""

    @property
    def text(self) -> str:
        """All turns, without the template."""
        return "\n".join(message.content for message in self.messages)


@dataclass(frozen=True)
class ReplayWriter:
    """The base with its tokenizer, and how it writes."""

    model: Any
    tokenizer: Any
    system: str | None
    temperature: float
    openings: Sequence[str]
    """First words of the questions, in rotation."""
    max_new_tokens: int
    batch_size: int

    def write(self, numbers: Sequence[int]) -> list[ReplayRow]:
        """A row for each number, which alone decides its random draws."""
        if self.tokenizer.chat_template is not None:
            return self._converse(numbers)
        start = self.tokenizer.bos_token or self.tokenizer.eos_token or ""
        return [
            ReplayRow(number, (Message("text", text),), finished)
            for number, (text, finished) in zip(numbers, self._begin(start, numbers), strict=True)
        ]

    def _converse(self, numbers: Sequence[int]) -> list[ReplayRow]:
        start, _ = self._around_a_question
        questions: dict[int, str] = {}
        asked = []
        for number, (text, finished) in zip(numbers, self._begin(start, numbers), strict=True):
            mark = self._plain_mark
            questions[number] = (text.partition(mark)[0] if mark else text).strip()
            if questions[number] and (finished or (mark and mark in text)):
                asked.append(number)
        prompts = [
            prompt_of([Message("user", questions[number])], self.tokenizer, self.system)
            for number in asked
        ]
        answers = dict(zip(asked, self._continue(prompts, asked, 1), strict=True))
        rows = []
        for number, question in questions.items():
            answer = answers.get(number, REFUSED)
            messages = (Message("user", question), Message("assistant", answer.text))
            rows.append(ReplayRow(number, messages, answer.stopped))
        return rows

    def _begin(self, start: str, numbers: Sequence[int]) -> list[tuple[str, bool]]:
        """The first turn of each row, and whether it is finished."""
        openings = [
            self.openings[number % len(self.openings)] if self.openings else ""
            for number in numbers
        ]
        written = self._continue([start + opening for opening in openings], numbers, 0)
        return [
            (opening + " " * (bool(opening) and turn.starts_with_blank) + turn.text, turn.stopped)
            for opening, turn in zip(openings, written, strict=True)
        ]

    def _continue(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], turn: int
    ) -> list[Generated]:
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

    @cached_property
    def _around_a_question(self) -> tuple[str, str]:
        """What the template writes before and after a question."""
        text = prompt_text([Message("user", PLACEHOLDER)], self.tokenizer, self.system)
        before, _, after = text.rpartition(PLACEHOLDER)
        # A blank at the end of a prompt would be a token that the model has never seen there.
        return before.rstrip(" "), after

    @cached_property
    def _turn_end_ids(self) -> list[int]:
        """The mark after a question, if it is a single token."""
        if self.tokenizer.chat_template is None:
            return []
        ids = self.tokenizer(self._around_a_question[1], add_special_tokens=False)["input_ids"]
        marks = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        return [token for token in ids[:1] if token in marks]

    @cached_property
    def _plain_mark(self) -> str:
        """The mark after a question in plain text, such as [/INST]; empty if it is a token."""
        if self._turn_end_ids:
            return ""
        lines = self._around_a_question[1].strip().splitlines()
        return lines[0].strip() if lines else ""


def find_fault(row: ReplayRow, seen: "SeenTexts") -> ReplayFault | None:
    """Why a row is dropped; None where it is usable."""
    if not row.finished:
        return "unfinished"
    if not all(message.content for message in row.messages):
        return "empty"
    if windowed_repetition(pieces_of(row.text)) > LOOP:
        return "loop"
    return "duplicate" if seen.has(row.text) else None


class SeenTexts:
    """An index of texts that finds near-duplicates."""

    def __init__(self) -> None:
        self.shingles: list[Shingles] = []
        self.rows_with: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, text: str) -> None:
        """Add a text."""
        shingles = shingles_of(text)
        for shingle in shingles:
            self.rows_with[shingle].append(len(self.shingles))
        self.shingles.append(shingles)

    def has(self, text: str) -> bool:
        """Whether an added text shares at least `ALIKE` of the 3-grams of both."""
        shingles = shingles_of(text)
        common = Counter(row for shingle in shingles for row in self.rows_with.get(shingle, ()))
        return any(
            number >= ALIKE * (len(shingles) + len(self.shingles[row]) - number)
            for row, number in common.items()
        )


def shingles_of(text: str) -> Shingles:
    """The 3-grams of a text's words, numbers and Chinese characters; a shorter text as a whole."""
    units = units_of(text) or pieces_of(text)
    starts = range(max(1, len(units) - SIZE + 1))
    return frozenset(tuple(units[start : start + SIZE]) for start in starts)
