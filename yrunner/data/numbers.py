"""Read the numbers that a text ends with, as they are written in English and Chinese."""

import re
import unicodedata
from collections import deque
from fractions import Fraction
from typing import Any

_DIGITS = r"\d{1,3}(?:,\d{3})+(?!\d)|\d+"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]])[-+])?"
    rf"(?:(?P<whole>{_DIGITS})(?P<point>\.\d+)?|(?<![\d.])(?P<bare>\.\d+))"
    r"(?:e(?P<power>[-+]?\d{1,3})(?![\w]))?"
    r"(?:\s?/\s?(?P<below>\d+)(?![\d/.]))?"
    r"\s?(?P<unit>[万亿])?",
    re.IGNORECASE,
)
_UNITS = {"万": 10**4, "亿": 10**8}
_MINUS = str.maketrans({"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-"})


def last_number(value: Any) -> Fraction | None:
    """A number, or the last number of a text; None if there is none.

    It may have full-width digits, commas between thousands, a power of ten, a fraction's slash,
    and 万 or 亿.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value - value != 0:
        return None
    if isinstance(value, (int, float)):
        return Fraction(str(value))
    # NFKC also makes a full-width comma or point plain.
    text = unicodedata.normalize("NFKC", str(value)).translate(_MINUS)
    last = deque(_NUMBER.finditer(text), maxlen=1)
    return _value(last[0]) if last else None


def _value(match: re.Match[str]) -> Fraction:
    whole = (match["whole"] or "0").replace(",", "")
    number = Fraction(f"{whole}{match['point'] or match['bare'] or ''}")
    if match["power"]:
        number *= Fraction(10) ** int(match["power"])
    if match["below"] and int(match["below"]):
        number /= int(match["below"])
    number *= _UNITS.get(match["unit"] or "", 1)
    return -number if match["sign"] == "-" else number
