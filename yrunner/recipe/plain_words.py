"""What a word without quotes means in a recipe: a number, true or false, nothing, or text.

As in YAML 1.2, where 1e-4 is a number and 010, 1:30 and 2026-01-01 are not something surprising;
besides, yes/no/on/off are the booleans that many people expect them to be.
"""

import re

Scalar = str | int | float | bool | None

# 18 digits always fit 64 bits; a longer number is a slip of the finger and stays text.
_INTEGER = re.compile(r"[-+]?(0|[1-9](_?[0-9]){0,17}|0x[0-9a-fA-F]{1,15})")
FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_NAMED: dict[str, bool | None] = {"": None, "~": None, "null": None} | {
    word: value
    for value, words in ((True, ("true", "yes", "on")), (False, ("false", "no", "off")))
    for word in words
}


def read_plain_scalar(text: str) -> Scalar:
    """What a word without quotes means."""
    word = text.lower() if text in (text.lower(), text.title(), text.upper()) else text
    if word in _NAMED:
        return _NAMED[word]
    if _INTEGER.fullmatch(text):
        return int(text, 0)
    if FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text
