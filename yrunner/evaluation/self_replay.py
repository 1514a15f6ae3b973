"""Self-replay: the base writes rows, and those that are not usable are found.

A chat model gets the start of a user turn in its own template, writes the question, and answers it.
A model without a template continues its start-of-text token.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from yrunner.data.chat.tokenize import prompt_of, prompt_text
from yrunner.data.conversation import Message
from yrunner.data.text_metrics import pieces_of, units_of, windowed_repetition
from yrunner.evaluation.generate import Advance, Seed
from yrunner.evaluation.refilled import SeededPrompt, answers_as_they_end
from yrunner.recipe.schema.eval import SampleWriting

Series = Literal["held_out", "rows"]
SERIES: tuple[Series, ...] = ("held_out", "rows")
"""The rows that drift is measured on, and the rows that are replayed: drawn apart."""
ReplayFault = Literal["empty", "loop", "duplicate"]
FAULTS: tuple[ReplayFault, ...] = ("empty", "loop", "duplicate")

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
class Draft:
    """A row to write: series and number alone decide its random draws."""

    series: Series
    number: int


@dataclass(frozen=True)
class ReplayRow:
    """A row that the base wrote."""

    draft: Draft
    messages: tuple[Message, ...]
    """An empty question has no answer."""
    finished: bool
    """False where a turn was cut off."""

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

    def write(
        self,
        next_draft: Callable[[], Draft | None],
        *,
        advance: Advance = lambda _: None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> Iterator[ReplayRow]:
        """A row for each draft, in the order in which they end.

        `next_draft` is called when there is room in the batch; None: there is none until another
        row has ended. `advance` is called with the number of tokens written. Once `is_over`, no
        row is finished.
        """
        self.model.eval()
        questions: dict[Draft, tuple[str, bool]] = {}
        asked: dict[SeededPrompt, Draft] = {}
        to_answer: deque[SeededPrompt] = deque()

        def next_prompt() -> SeededPrompt | None:
            if to_answer:
                return to_answer.popleft()
            draft = next_draft()
            if draft is None:
                return None
            prompt = SeededPrompt(self._start + self._opening(draft), _seed(draft, turn=0))
            asked[prompt] = draft
            return prompt

        answers = answers_as_they_end(
            self.model,
            self.tokenizer,
            next_prompt,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            generation=SampleWriting(kind="sample", temperature=self.temperature),
            also_stop_at=self._turn_end_ids,
            advance=advance,
            is_over=is_over,
        )
        for prompt, turn in answers:
            draft = asked.pop(prompt)
            # The last token of a turn that was cut off may be a part of a character.
            text = turn.text.rstrip("\ufffd")
            if draft in questions:
                question, has_ended = questions.pop(draft)
                messages = (Message("user", question), Message("assistant", text))
                yield ReplayRow(draft, messages, has_ended and turn.stopped)
                continue
            opening = self._opening(draft)
            text = opening + " " * (bool(opening) and turn.starts_with_blank) + text
            if self.tokenizer.chat_template is None:
                yield ReplayRow(draft, (Message("text", text),), turn.stopped)
                continue
            question, has_mark = self._question(text)
            if question:
                questions[draft] = question, has_mark or turn.stopped
                asking = prompt_of([Message("user", question)], self.tokenizer, self.system)
                text_or_ids = asking if isinstance(asking, str) else tuple(asking)
                to_answer.append(SeededPrompt(text_or_ids, _seed(draft, turn=1)))
                asked[to_answer[-1]] = draft
            else:
                yield ReplayRow(draft, (Message("user", question),), turn.stopped)

    def _opening(self, draft: Draft) -> str:
        return self.openings[draft.number % len(self.openings)] if self.openings else ""

    def _question(self, text: str) -> tuple[str, bool]:
        """The question in a first turn, and whether a mark in plain text ends it."""
        question, mark, _ = text.partition(self._plain_mark) if self._plain_mark else (text, "", "")
        return question.strip(), bool(mark)

    @cached_property
    def _start(self) -> str:
        """What comes before the first word that the base writes."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer.bos_token or self.tokenizer.eos_token or ""
        return self._around_a_question[0]

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


def _seed(draft: Draft, turn: int) -> Seed:
    return 2 * SERIES.index(draft.series) + turn, draft.number


def find_fault(row: ReplayRow, seen: "SeenTexts") -> ReplayFault | None:
    """Why a row is dropped; None where it is usable, perhaps without an end."""
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
