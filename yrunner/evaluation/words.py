"""A text as the units that answers are compared by: words, numbers, Chinese characters.

Chinese has no blanks between words, so each of its characters is a unit; that needs no dictionary,
and is what F1, ROUGE and BLEU are usually computed on for Chinese.
"""

import re
import unicodedata

from yrunner.data.findings import SCRIPTS

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
