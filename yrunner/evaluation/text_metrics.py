"""How near an answer is to its reference: equal, containing it, or sharing words with it."""

from collections import Counter
from functools import cache
from typing import Any

from rapidfuzz.distance import LCSseq

from yrunner.data.spans import THINK_CLOSE
from yrunner.evaluation.words import units_of

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
