"""The columns of a row: under which name a value stands, and how a message names what it is."""

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

from yrunner.data.conversation import FaultyRow

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


def type_name(value: Any) -> str:
    """What kind of value it is, in the words of JSON."""
    return TYPE_NAMES.get(type(value), type(value).__name__)


def shown(text: str) -> str:
    """A text of the user's, short and printable enough for a message."""
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]}..."
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def quoted(value: Any) -> str:
    """A text in quotes, and of any other value what kind it is."""
    return f'"{shown(value)}"' if isinstance(value, str) else type_name(value)


def is_absent(value: Any) -> bool:
    """Whether there is no value: json leaves the key out, parquet has null, csv an empty cell."""
    return value is None or (not value and isinstance(value, (str, list, dict)))


def renamed(
    row: Mapping[str, Any], columns: Mapping[str, str], synonyms: Sequence[tuple[str, ...]]
) -> dict[str, Any]:
    """The row under the format's names: `columns` maps the format's name to the file's.

    A name that is mapped never falls back to the file's column of that very name, nor to one of
    its `synonyms`, the groups of names that mean the same.
    """
    mapped = {*columns, *columns.values()}
    for names in synonyms:
        if not columns.keys().isdisjoint(names):
            mapped.update(names)
    own = {key: value for key, value in row.items() if key not in mapped}
    return own | {name: row[there] for name, there in columns.items() if there in row}


def filled(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """The one of these names, of which the row has some, that has a value.

    Raises `FaultyRow` where two have.
    """
    found = [name for name in names if not is_absent(row.get(name))]
    if len(found) > 1:
        first, second = found[:2]
        reason = f'has both "{first}" and "{second}"; to learn from the latter, '
        raise FaultyRow(f"{reason}set columns: {{{first}: {second}}}", "wrong_type")
    return found[0] if found else next(name for name in names if name in row)


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The text in a column that the row has. Raises `FaultyRow` where it is something else."""
    value = row[column]
    if not isinstance(value, str):
        raise FaultyRow(f'"{column}" is {type_name(value)}, not text', "wrong_type")
    return value


def check_characters(where: str, text: str) -> None:
    """Refuse halves of surrogate pairs: JSON can hold them, and no tokenizer or file does.

    Raises `FaultyRow`, which names the place by `where`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FaultyRow(
            f"{where}: character {error.start + 1} is {shown(text[error.start])}, half of a "
            "character that was cut in two",
            "characters",
        ) from error
