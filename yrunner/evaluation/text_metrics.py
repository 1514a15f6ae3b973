"""Questions that are answered as training goes: how many of the answers are right.

How near an answer is to its reference: equal, containing it, or sharing words with it.

How well a text reads, as far as counting can tell: repetition, variety, density.

The pieces that are counted are words, numbers, Chinese characters and signs, not the tokens of a
model: so the texts of models with different tokenizers can be compared.

A text as the units that answers are compared by: words, numbers, Chinese characters.

Chinese has no blanks between words, so each of its characters is a unit; that needs no dictionary,
and is what F1, ROUGE and BLEU are usually computed on for Chinese.
"""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from rapidfuzz.distance import LCSseq

from yrunner.data.chat.loss_mask import THINK_CLOSE
from yrunner.data.dataset.quality import SCRIPTS

_ALONE = "".join(
    f"{chr(first)}-{chr(last)}" for script in ("Chinese", "Kana") for first, last in SCRIPTS[script]
)
_NUMBER = r"(?:(?<![\w.)])-)?\d+(?:,\d{3})*(?:\.\d+)*"
_UNIT = re.compile(rf"{_NUMBER}|[{_ALONE}]|[^\W\d_{_ALONE}]+|[^\w\s]|_")
_MEANING = "%‰"
"""Punctuation, to Unicode, that changes what a number says."""


def pieces_of(text: str) -> list[str]:
    """Every word, number, Chinese character and sign of a text, as it is written."""
    return _UNIT.findall(text)


def units_of(text: str) -> list[str]:
    """The words, numbers and Chinese characters of a text, without what is only a way of writing.

    Full and half width, upper and lower case, punctuation and blanks make no difference; signs of
    mathematics and of currencies do, and so do the point and the minus of a number.
    """
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\N{MINUS SIGN}", "-")
    units = (unit.replace(",", "") if unit[-1].isdigit() else unit for unit in pieces_of(plain))
    return [unit for unit in units if not _is_punctuation(unit)]


def _is_punctuation(unit: str) -> bool:
    return not unit or (
        unicodedata.category(unit[0])[0] == "P" and unit not in _MEANING and len(unit) == 1
    )


ANSWER_FIGURES = ("exact", "contains", "f1", "rouge_l", "bleu", "chrf")
"""What `answer_figures` gives, each from 0 to 1."""


def answer_figures(answer: str, reference: str) -> dict[str, float]:
    """All figures of one answer, from 0 to 1. What a model thinks before it answers is left out."""
    answer, reference = without_thinking(answer), without_thinking(reference)
    given, wanted = units_of(answer), units_of(reference)
    values = (
        is_exact(answer, reference),
        contains(answer, reference),
        f1(given, wanted),
        rouge_l(given, wanted),
        bleu(answer, reference),
        chrf(answer, reference),
    )
    return dict(zip(ANSWER_FIGURES, map(float, values), strict=True))


def without_thinking(text: str) -> str:
    """What comes after a thinking block, without outer blanks."""
    return text.rpartition(THINK_CLOSE)[2].strip()


def is_exact(answer: str, reference: str) -> bool:
    """Whether both say the same but for width, case, punctuation and blanks.

    A reference of nothing but punctuation has to be given as it is.
    """
    wanted = units_of(reference)
    return units_of(answer) == wanted if wanted else answer.strip() == reference.strip()


def contains(answer: str, reference: str) -> bool:
    """Whether the units of the reference stand in the answer, one behind the other."""
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

    Of a short answer only the n-grams count that it is long enough for.
    """
    return float(_bleu().sentence_score(answer, [reference]).score) / 100


def chrf(answer: str, reference: str) -> float:
    """chrF of one answer by sacrebleu, over 100: n-grams of characters, for every language."""
    return float(_chrf().sentence_score(answer, [reference]).score) / 100


def _harmonic(num_common: int, given: list[str], wanted: list[str]) -> float:
    return 2 * num_common / (len(given) + len(wanted)) if num_common else 0.0


@cache
def _bleu() -> Any:
    # Here, because `yrun train` needs none of it.
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="zh", effective_order=True)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


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
        """For `before.json` and `after.json`."""
        return {**asdict(self), "right": self.is_right}


def share_right(answered: Sequence[Answered]) -> float:
    """Share of the questions that were answered exactly."""
    return sum(row.is_right for row in answered) / len(answered)


WINDOW = 50
"""Pieces over which a repeat counts; see `windowed_repetition`."""


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
    """The share of all n-grams of `size` that occur more than once; 0 where there is none."""
    counts = Counter(_ngrams(pieces, size))
    repeated = sum(count for count in counts.values() if count > 1)
    return repeated / counts.total() if counts else 0.0


def windowed_repetition(pieces: Sequence[str], size: int = 4, window: int = WINDOW) -> float:
    """How densely a text repeats itself, from 0 to almost 1.

    An n-gram that follows its like at a distance of d pieces counts 1 - (d - 1) / window, and
    nothing from `window` + 1 on; the sum is divided by the number of n-grams. So code may call a
    function again, and a model that says one thing over and over is found.
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
    """Different n-grams over all n-grams (Li et al., 2016); 1 where there is none."""
    ngrams = _ngrams(pieces, size)
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def density(text: str) -> float:
    """Compressed size over size in bytes, at most 1: low where little new is said."""
    size = len(text.encode())
    return min(1.0, len(zlib.compress(text.encode(), 9)) / size) if size else 1.0


def _ngrams(pieces: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return list(zip(*(pieces[start:] for start in range(size)), strict=False))
