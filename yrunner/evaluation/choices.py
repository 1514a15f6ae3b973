"""Multiple-choice questions as people keep them: a list or columns, a number, letter or text."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from yrunner.data.columns import quoted, type_name
from yrunner.data.conversation import Message
from yrunner.data.files import read_rows
from yrunner.data.rows import Damaged
from yrunner.errors import DataError, Origin
from yrunner.evaluation.questions import Question


def read_choices(
    file: Path, *, question: str, choices: str | Sequence[str], answer: str
) -> list[Question]:
    """The questions of a file, from columns of these names. Raises `DataError` at a faulty row.

    Where the file has no list of `choices`, its columns A, B, C... are taken.
    """
    questions = [_read(origin, row, question, choices, answer) for origin, row in read_rows(file)]
    if not questions:
        raise DataError(file, "holds no rows, there is nothing to ask", remedy="add some")
    return questions


def _read(
    origin: Origin, row: Any, question: str, choices: str | Sequence[str], answer: str
) -> Question:
    if isinstance(row, Damaged):
        raise DataError(origin, str(row), remedy="mend the row; every question counts")
    if not isinstance(row, Mapping):
        raise DataError(
            origin, f"is {type_name(row)}, not an object", remedy="write one object in each row"
        )
    texts = _choices(row, choices)
    if len(texts) < 2:
        raise DataError(
            origin,
            f'"{choices}" is no list of two choices or more, and there are no columns A and B',
            remedy="name the column of the choices in the task: choices",
        )
    asked = row.get(question)
    if not isinstance(asked, str) or not asked.strip():
        raise DataError(origin, f'has no text in "{question}"', remedy="set question in the task")
    if answer not in row:
        raise DataError(
            origin, f'has no "{answer}", so no choice is right', remedy="set answer in the task"
        )
    right = _right(row[answer], texts)
    if right is None:
        raise DataError(
            origin,
            f'"{answer}" is {quoted(row[answer])}, which is none of its {len(texts)} choices',
            remedy="give its number from 0, its letter, or its text",
        )
    return Question((Message("user", asked.strip()),), texts[right], origin, tuple(texts))


def _choices(row: Mapping[str, Any], choices: str | Sequence[str]) -> list[str]:
    if isinstance(choices, str) and isinstance(row.get(choices), list):
        return [str(choice).strip() for choice in row[choices]]
    # A row may have fewer choices than others; a column Q behind a gap is none of them.
    columns = ascii_uppercase if isinstance(choices, str) else choices
    filled = takewhile(lambda column: row.get(column) not in (None, ""), columns)
    return [str(row[column]).strip() for column in filled]


def _right(answer: Any, texts: Sequence[str]) -> int | None:
    """The number of the right choice. What could be a text is looked for as a text first, then as a
    letter, then as a number, which is text in a table.
    """
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(texts) else None
    word = str(answer).strip()
    if word in texts:
        return texts.index(word)
    letters = ascii_uppercase[: len(texts)]
    if len(word) == 1 and word.upper() in letters:
        return letters.index(word.upper())
    return int(word) if word.isdecimal() and int(word) < len(texts) else None
