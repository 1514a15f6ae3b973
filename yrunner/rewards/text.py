"""Rewards for what an answer says: the right text, number or pattern, its length and language."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, assert_never

import regex

from yrunner.console import warn
from yrunner.data.chat.reply_text import answer_behind_thinking
from yrunner.data.dataset.quality import count_scripts
from yrunner.data.numbers import last_number
from yrunner.data.text_metrics import (
    comparable,
    pieces_of,
    repetition,
    units_of,
    windowed_repetition,
)
from yrunner.recipe.schema.rewards import (
    ExactReward,
    LanguageReward,
    LengthReward,
    NumberReward,
    PatternReward,
    RepetitionReward,
)
from yrunner.rewards.completion import Completion

SECONDS_PER_ANSWER = 1.0
"""Time for a pattern to match an answer. Patterns that need more would need years for others."""
SCRIPTS = {"zh": "Chinese", "en": "Latin"}

OneScore = Callable[[Completion], float | None]
TextSection = (
    ExactReward | PatternReward | NumberReward | LengthReward | RepetitionReward | LanguageReward
)


class TextScores:
    """A reward that looks at each answer alone."""

    def __init__(self, name: str, weight: float, score_one: OneScore) -> None:
        self.name, self.weight, self.score_one = name, weight, score_one

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        """The score of each answer."""
        return [self.score_one(completion) for completion in completions]


def text_score(section: TextSection) -> OneScore:
    """How the reward of a section scores one answer."""
    match section:
        case ExactReward():
            return partial(_exact, section)
        case PatternReward():
            return _Pattern(section)
        case NumberReward():
            return partial(_number, section)
        case LengthReward():
            return partial(_length, section)
        case RepetitionReward():
            return partial(_unrepeated, section)
        case LanguageReward():
            return partial(_language, section)
        case _:
            assert_never(section)


def read_answer(text: str, tag: str | None) -> str | None:
    """The part of a text that a reward reads; None without one.

    That is what the last pair of the tag's marks encloses, or without a tag everything behind the
    thinking.
    """
    if tag is not None:
        before, close, _ = text.rpartition(f"</{tag}>")
        _, mark, inside = before.rpartition(f"<{tag}>")
        return inside.strip() if close and mark else None
    return answer_behind_thinking(text)


def _exact(section: ExactReward, completion: Completion) -> float:
    text = read_answer(completion.text, section.tag)
    if text is None:
        return 0.0
    right = completion.columns[section.column]
    answers = [_as_text(answer) for answer in (right if isinstance(right, list) else [right])]
    return float(any(_is_same(text, _plain(it), section.ignore) for it in answers))


def _as_text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def _is_same(text: str, right: str, ignore: Collection[str]) -> bool:
    wanted = comparable(right, ignore)
    # An answer of nothing but punctuation must be given as it is.
    return comparable(text, ignore) == wanted if wanted else text == right


class _Pattern:
    """Whether a pattern matches; one that takes too long does not."""

    def __init__(self, section: PatternReward) -> None:
        self.section = section
        self.pattern = regex.compile(section.pattern, regex.DOTALL)
        self.has_warned = False

    def __call__(self, completion: Completion) -> float:
        text = read_answer(completion.text, self.section.tag)
        if text is None:
            return 0.0
        match = self.pattern.search if self.section.match == "anywhere" else self.pattern.fullmatch
        try:
            return float(match(text, timeout=SECONDS_PER_ANSWER) is not None)
        except TimeoutError:
            if not self.has_warned:
                warn(
                    f"rewards: {self.section.shown_name}: the pattern took more than "
                    f"{SECONDS_PER_ANSWER:g} s on an answer to {completion.origin}; such an answer "
                    "counts as no match. Avoid repetitions inside repetitions, such as (a+)+"
                )
            self.has_warned = True
            return 0.0


def _number(section: NumberReward, completion: Completion) -> float:
    text = read_answer(completion.text, section.tag)
    given = None if text is None else last_number(text)
    right = last_number(_plain(completion.columns[section.column]))
    if given is None or right is None:
        return 0.0
    if given == right:
        return 1.0
    is_near = abs(given - right) <= section.tolerance
    # Of the right number: `isclose` would take the larger of both.
    is_near |= abs(given - right) <= section.relative_tolerance * abs(right)
    return float(is_near)


def _plain(value: Any) -> Any:
    return answer_behind_thinking(value) or value if isinstance(value, str) else value


def _length(section: LengthReward, completion: Completion) -> float:
    text = read_answer(completion.text, section.tag)
    if text is None:
        return 0.0
    match section.unit:
        case "tokens":
            length = completion.num_tokens
        case "words":
            length = len(units_of(text))
        case "characters":
            length = len(text)
    distance = max(section.minimum - length, length - (section.maximum or length), 0)
    if not distance:
        return 1.0
    return max(0.0, 1 - distance / section.margin) if section.margin else 0.0


def _unrepeated(section: RepetitionReward, completion: Completion) -> float | None:
    text = read_answer(completion.text, section.tag)
    pieces = pieces_of(text or "")
    if not pieces:
        return 0.0 if text is None else None
    measure = repetition if section.measure == "ngrams" else windowed_repetition
    return 1 - measure(pieces, section.size)


def _language(section: LanguageReward, completion: Completion) -> float | None:
    text = read_answer(completion.text, section.tag)
    if text is None:
        return 0.0
    letters = {
        script: number for script, number in count_scripts([text]).items() if script != "digits"
    }
    total = sum(letters.values())
    return letters[SCRIPTS[section.language]] / total if total else None
