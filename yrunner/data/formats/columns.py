"""Columns of a row: their names, their values, and how messages describe these."""

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import NoneType
from typing import Any, Literal

from yrunner.data.conversation import FaultyRow

EVERY_COLUMN = "*"
SHOWN_CHARACTERS = 40

TYPE_NAMES: dict[type, str] = {
    str: "text",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "a number",
    float: "a number",
    NoneType: "null",
}


@dataclass(frozen=True)
class Need:
    """A column that a reward reads."""

    column: str
    """`EVERY_COLUMN`: all that there are."""
    by: str
    """The name of the reward."""
    kind: Literal["texts", "number", "schema", "value", "optional"] = "value"
    """`texts`: text or a number, or a list of these. `value`: anything but null."""


def type_name(value: Any) -> str:
    """The type of a value in the words of JSON."""
    return TYPE_NAMES.get(type(value), type(value).__name__)


def shown(text: str) -> str:
    """A text from a data file, short and printable enough for a message."""
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]}..."
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def quoted(value: Any) -> str:
    """A text in quotes, or the type of any other value."""
    return f'"{shown(value)}"' if isinstance(value, str) else type_name(value)


def is_absent(value: Any) -> bool:
    """Whether a value is missing: JSON omits the key, parquet has null, csv an empty cell."""
    return value is None or (not value and isinstance(value, (str, list, dict)))


SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")


@lru_cache(maxsize=4096)
def plain_name(name: str) -> str:
    """A column's name in lower case with underscores: `System Prompt` is `system_prompt`."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.strip())
    return re.sub(r"[\s_-]+", "_", words).lower()


def plainly_named(
    row: Mapping[str, Any], known: Container[str], columns: Mapping[str, str]
) -> Mapping[str, Any]:
    """The row with its `known` columns under their `plain_name`, unless `columns` maps them."""
    others = {
        name: plain_name(name)
        for name in row
        if name not in known and isinstance(name, str) and name not in columns.values()
    }
    names = {name: plain for name, plain in others.items() if plain in known and plain not in row}
    return {names.get(name, name): value for name, value in row.items()} if names else row


def renamed(
    row: Mapping[str, Any], columns: Mapping[str, str], synonyms: Sequence[tuple[str, ...]]
) -> dict[str, Any]:
    """The row with the format's column names; `columns` maps these to the file's names.

    A mapped name never falls back to the file's own column of that name, nor to one of its
    `synonyms`: groups of names with the same meaning.
    """
    mapped = {*columns, *columns.values()}
    for names in synonyms:
        if not columns.keys().isdisjoint(names):
            mapped.update(names)
    own = {key: value for key, value in row.items() if key not in mapped}
    return own | {name: row[there] for name, there in columns.items() if there in row}


def filled(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """The one of these columns that has a value; the row has at least one of them.

    Raises `FaultyRow` if two have a value.
    """
    found = [name for name in names if not is_absent(row.get(name))]
    if len(found) > 1:
        first, second = found[:2]
        reason = f'has both "{first}" and "{second}"; to use the second, '
        raise FaultyRow(f"{reason}set columns: {{{first}: {second}}}", "wrong_type")
    return found[0] if found else next(name for name in names if name in row)


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The text in a column of the row. Raises `FaultyRow` for any other value."""
    value = row[column]
    if not isinstance(value, str):
        raise FaultyRow(f'"{column}" is {type_name(value)}, not text', "wrong_type")
    return value


def system_of(row: Mapping[str, Any]) -> str | None:
    """The system message in a column of the row, if any. Raises `FaultyRow` for two different."""
    given = [name for name in SYSTEM_COLUMNS if not is_absent(row.get(name))]
    return text_of(row, filled(row, given)) if given else None


def check_characters(where: str, text: str) -> None:
    """Raise `FaultyRow` for an unpaired surrogate: JSON allows it, UTF-8 and tokenizers do not.

    `where` names the text in the message.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FaultyRow(
            f"{where}: character {error.start + 1} is {shown(text[error.start])}, an unpaired "
            "surrogate",
            "characters",
        ) from error
