"""Count what a text says: units of text, answers against references, and how a text reads.

Texts are cut into words, numbers, Chinese characters and signs, not into a model's tokens: so
models with different tokenizers can be compared. Chinese has no blanks between words, so each
character is a unit, as is usual for F1, ROUGE and BLEU on Chinese.
"""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

from rapidfuzz.distance import LCSseq

from yrunner.data.dataset.quality import SCRIPTS

_ALONE = "".join(
    f"{chr(first)}-{chr(last)}" for script in ("Chinese", "Kana") for first, last in SCRIPTS[script]
)
_NUMBER = r"(?:(?<![\w.)])-)?\d+(?:,\d{3})*(?:\.\d+)*"
_UNIT = re.compile(rf"{_NUMBER}|[{_ALONE}]|[^\W\d_{_ALONE}]+|[^\w\s]|_")
_MEANING = "%‰"
"""Unicode calls these punctuation, but they change what a number says."""


def pieces_of(text: str) -> list[str]:
    """Every word, number, Chinese character and sign of a text, as written."""
    return _UNIT.findall(text)


def units_of(text: str) -> list[str]:
    """The words, numbers and Chinese characters of a text, normalised.

    Width, case, punctuation and blanks make no difference; signs of mathematics and currencies do,
    and so do the point and the minus of a number.
    """
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\N{MINUS SIGN}", "-")
    units = (unit.replace(",", "") if unit[-1].isdigit() else unit for unit in pieces_of(plain))
    return [unit for unit in units if not _is_punctuation(unit)]


def comparable(text: str, ignore: Collection[str]) -> list[str] | str:
    """A text without the differences to ignore: `case`, `width`, `punctuation`, `blanks`.

    With all four, two texts are equal as their `units_of` are.
    """
    if "width" in ignore:
        text = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")
    if "case" in ignore:
        text = text.casefold()
    if "punctuation" in ignore:
        gap = " " if "blanks" in ignore else ""
        text = _UNIT.sub(lambda unit: _without_punctuation(unit[0], gap), text)
    return pieces_of(text) if "blanks" in ignore else text.strip()


def _without_punctuation(unit: str, gap: str) -> str:
    if unit[-1].isdigit():
        unit = unit.replace(",", "")
    return gap if _is_punctuation(unit) else unit


def _is_punctuation(unit: str) -> bool:
    return not unit or (
        unicodedata.category(unit[0])[0] == "P" and unit not in _MEANING and len(unit) == 1
    )


def answer_figures(answer: str, reference: str) -> dict[str, float]:
    """All figures of one answer, from 0 to 1."""
    return {figure: answer_figure(figure, answer, reference) for figure in ANSWER_FIGURES}


def answer_figure(figure: str, answer: str, reference: str) -> float:
    """One of `ANSWER_FIGURES`."""
    return float(ANSWER_FIGURES[figure](answer, reference))


def is_exact(answer: str, reference: str) -> bool:
    """Whether both are equal except for width, case, punctuation and blanks.

    A reference of nothing but punctuation must be given as it is.
    """
    wanted = units_of(reference)
    return units_of(answer) == wanted if wanted else answer.strip() == reference.strip()


def contains(answer: str, reference: str) -> bool:
    """Whether the answer has the units of the reference, one after another."""
    given, wanted = units_of(answer), units_of(reference)
    if not wanted:
        return reference.strip() in answer
    starts = range(len(given) - len(wanted) + 1)
    return any(given[start : start + len(wanted)] == wanted for start in starts)


def f1(given: list[str], wanted: list[str]) -> float:
    """Units in common, whatever their order: the harmonic mean of precision and recall."""
    return _harmonic((Counter(given) & Counter(wanted)).total(), given, wanted)


def rouge_l(given: list[str], wanted: list[str]) -> float:
    """ROUGE-L: units in common in the same order (Lin, 2004), precision and recall alike."""
    return _harmonic(LCSseq.similarity(given, wanted), given, wanted)


def bleu(answer: str, reference: str) -> float:
    """BLEU of one answer by sacrebleu, over 100; its Chinese tokenizer reads English too.

    A short answer counts only the n-grams it is long enough for (effective order).
    """
    return float(_bleu().sentence_score(answer, [reference]).score) / 100


def chrf(answer: str, reference: str) -> float:
    """chrF of one answer by sacrebleu, over 100: n-grams of characters, for every language."""
    return float(_chrf().sentence_score(answer, [reference]).score) / 100


ANSWER_FIGURES: dict[str, Callable[[str, str], float]] = {
    "exact": is_exact,
    "contains": contains,
    "f1": lambda answer, reference: f1(units_of(answer), units_of(reference)),
    "rouge_l": lambda answer, reference: rouge_l(units_of(answer), units_of(reference)),
    "bleu": bleu,
    "chrf": chrf,
}
"""Figures of an answer and its reference, each from 0 to 1."""


def _harmonic(num_common: int, given: list[str], wanted: list[str]) -> float:
    return 2 * num_common / (len(given) + len(wanted)) if num_common else 0.0


@cache
def _bleu() -> Any:
    # Imported here: `yrun train` does not need it.
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="zh", effective_order=True)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


WINDOW = 50
"""Distance in pieces up to which a repeat counts."""


def text_quality(text: str) -> dict[str, float]:
    """All figures of one text."""
    pieces = pieces_of(text)
    return {
        "repetition_3": repetition(pieces, 3),
        "repetition_4": repetition(pieces, 4),
        "windowed_repetition": windowed_repetition(pieces),
        "distinct_1": distinct(pieces, 1),
        "distinct_2": distinct(pieces, 2),
        "density": density(text),
        "length": float(len(pieces)),
    }


def repetition(pieces: Sequence[str], size: int) -> float:
    """The share of n-grams that occur more than once; 0 for a text without n-grams."""
    counts = Counter(_ngrams(pieces, size))
    repeated = sum(count for count in counts.values() if count > 1)
    return repeated / counts.total() if counts else 0.0


def windowed_repetition(pieces: Sequence[str], size: int = 4, window: int = WINDOW) -> float:
    """How densely a text repeats itself, from 0 to almost 1.

    An n-gram that occurred d pieces before counts 1 - (d - 1) / window, or 0 beyond the window; the
    sum is divided by the number of n-grams. So code may repeat a call, and a loop is found.
    """
    ngrams = _ngrams(pieces, size)
    last: dict[tuple[str, ...], int] = {}
    total = 0.0
    for place, ngram in enumerate(ngrams):
        if ngram in last:
            total += max(0.0, 1 - (place - last[ngram] - 1) / window)
        last[ngram] = place
    return total / len(ngrams) if ngrams else 0.0


def distinct(pieces: Sequence[str], size: int) -> float:
    """Different n-grams over all n-grams (Li et al., 2016); 1 for a text without n-grams."""
    ngrams = _ngrams(pieces, size)
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def density(text: str) -> float:
    """Compressed size over size in bytes, at most 1: low where little new is said."""
    size = len(text.encode())
    return min(1.0, len(zlib.compress(text.encode(), 9)) / size) if size else 1.0


def _ngrams(pieces: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return list(zip(*(pieces[start:] for start in range(size)), strict=False))


def at_equal_length(one: str, other: str) -> tuple[str, str]:
    """Both texts, cut to the same number of pieces: all but the last of the shorter one.

    The last may be half a word, where the answer was cut off, and half a word repeats nothing.
    """
    ends = [[0, *(match.end() for match in _UNIT.finditer(text))] for text in (one, other)]
    number = max(0, min(map(len, ends)) - 2)
    return one[: ends[0][number]], other[: ends[1][number]]
