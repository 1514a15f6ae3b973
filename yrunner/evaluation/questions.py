"""Read questions with their reference answers or choices from data files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from yrunner.data.conversation import Conversation, FaultyRow, Message
from yrunner.data.dataset.row_report import Refusal
from yrunner.data.formats.columns import filled, is_absent, quoted, system_of, text_of, type_name
from yrunner.data.formats.formats import Reading, read_conversations
from yrunner.data.formats.preference import read_answers
from yrunner.data.formats.turns import read_turns
from yrunner.data.readers.files import read_rows
from yrunner.data.readers.text import Damaged
from yrunner.errors import DataError, Origin

TURNS = ("messages", "conversations", "conversation")
ASKING = ("instruction", "question", "query", "prompt", *TURNS)
ANSWERING = ("output", "answer", "response", "completion")

CORRECT_THE_ROW = "correct the row; questions are never skipped"


@dataclass(frozen=True)
class Question:
    """A question with the turns before it, and the right answer."""

    messages: tuple[Message, ...]
    reference: str
    """Empty where the row has none, and the task needs none."""
    origin: Origin
    choices: tuple[str, ...] = ()
    """The choices of a multiple-choice question."""

    @property
    def text(self) -> str:
        """The last turn, for tables; of a plain text its beginning."""
        return self.messages[-1].content if self.messages else self.reference[:200]


def question_of(conversation: Conversation) -> Question:
    """The last assistant turn is the reference, everything before it is the question.

    A plain text is a reference without a question. Of a prompt for rewards, the column `answer` is
    the reference.
    """
    if conversation.columns is not None:
        answer = conversation.columns.get("answer")
        reference = str(answer) if isinstance(answer, (str, int, float)) else ""
        return Question(conversation.messages, reference, conversation.origin)
    *messages, reply = conversation.messages
    return Question(tuple(messages), reply.content, conversation.origin)


def read_questions(file: Path) -> list[Question]:
    """The conversations of a file as questions. Raises `DataError` at the first faulty row."""
    if _only_asks(_first_row(file)):
        columns = ", ".join(ANSWERING[:-1])
        raise DataError(
            file,
            "has questions without reference answers",
            remedy=f"add them in a column such as {columns}, or as a last assistant message; "
            "the kinds format, judge_by_rule and quality need none",
        )
    questions = []
    for conversation in _conversations(file):
        if conversation.is_text:
            raise DataError(
                conversation.origin,
                "is a plain text, not a question with an answer",
                remedy="give each row a question and a reference answer",
            )
        questions.append(question_of(conversation))
    return questions


def read_texts(file: Path) -> list[Question]:
    """Plain texts, or the answers of conversations. Raises `DataError` at a faulty row."""
    return [question_of(conversation) for conversation in _conversations(file)]


def read_prompts(file: Path) -> list[Question]:
    """Questions with or without a reference. Raises `DataError` at the first faulty row."""
    if not _only_asks(_first_row(file)):
        return read_questions(file)
    questions = []
    for origin, row in read_rows(file):
        try:
            questions.append(Question(_asked(row), "", origin))
        except FaultyRow as fault:
            raise DataError(origin, str(fault), remedy=CORRECT_THE_ROW) from fault
    return questions


def _conversations(file: Path) -> Iterator[Conversation]:
    for row in read_conversations(file).rows:
        if isinstance(row, Refusal):
            raise DataError(row.origin, row.reason, remedy=CORRECT_THE_ROW)
        yield row


def _first_row(file: Path) -> Any:
    for _, row in read_rows(file):
        return row
    raise DataError(file, "has no rows", remedy="add some, or remove the task")


def _only_asks(row: Any) -> bool:
    """Whether a row has a question and no answer."""
    if not isinstance(row, Mapping) or any(not is_absent(row.get(name)) for name in ANSWERING):
        return False
    asking = [name for name in ASKING if not is_absent(row.get(name))]
    turns = [row[name] for name in asking if isinstance(row[name], list)]
    return bool(asking) and not any(_has_reply(part) for part in turns)


def _has_reply(turns: Sequence[Any]) -> bool:
    last = turns[-1]
    speaker = last.get("role", last.get("from")) if isinstance(last, Mapping) else None
    return speaker not in ("user", "human")


def _asked(row: Any) -> tuple[Message, ...]:
    """The question of a row without an answer. Raises `FaultyRow` where it has none."""
    if isinstance(row, Damaged):
        raise FaultyRow(str(row), "unreadable")
    if not isinstance(row, Mapping):
        raise FaultyRow(f"is {type_name(row)}, not an object with named fields", "not_an_object")
    if row.keys().isdisjoint(ASKING):
        raise FaultyRow("has no question", "missing_field")
    column = filled(row, ASKING)
    if isinstance(row[column], list):
        messages = read_turns(row[column], column)
    else:
        parts = [text_of(row, name) for name in (column, "input") if not is_absent(row.get(name))]
        messages = (Message("user", "\n".join(parts)),)
    if messages[-1].role != "user" or not messages[-1].content.strip():
        raise FaultyRow(f'has no question in "{column}"', "empty")
    system = system_of(row)
    return messages if system is None else (Message("system", system), *messages)


def read_pairs(file: Path) -> list[Question]:
    """Prompts whose choices are the better and the worse answer, in this order.

    Raises `DataError` at the first faulty row.
    """
    questions = []
    for row in read_answers(file, Reading()).rows:
        if isinstance(row, Refusal):
            raise DataError(row.origin, row.reason, remedy=CORRECT_THE_ROW)
        (*asked, better), (*_, worse) = (answer.messages for answer in row)
        choices = (better.content, worse.content)
        questions.append(Question(tuple(asked), better.content, row[0].origin, choices))
    return questions


def read_choices(
    file: Path, *, question: str, choices: str | Sequence[str], answer: str
) -> list[Question]:
    """The multiple-choice questions of a file, from columns of these names.

    A file without a list of `choices` has them in columns A, B, C... Raises `DataError` at a faulty
    row.
    """
    questions = [
        _multiple_choice(origin, row, question, choices, answer) for origin, row in read_rows(file)
    ]
    if not questions:
        raise DataError(file, "has no rows", remedy="add some, or remove the task")
    return questions


def _multiple_choice(
    origin: Origin, row: Any, question: str, choices: str | Sequence[str], answer: str
) -> Question:
    if isinstance(row, Damaged):
        raise DataError(origin, str(row), remedy=CORRECT_THE_ROW)
    if not isinstance(row, Mapping):
        raise DataError(
            origin, f"is {type_name(row)}, not an object", remedy="write one object in each row"
        )
    texts = _choices(row, choices)
    if len(texts) < 2:
        raise DataError(
            origin,
            f'"{choices}" is not a list of two choices or more, and there are no columns A and B',
            remedy="set choices in the task to the column that has them",
        )
    asked = row.get(question)
    if not isinstance(asked, str) or not asked.strip():
        raise DataError(
            origin,
            f'has no text in "{question}"',
            remedy="set question in the task to the column that has it",
        )
    if answer not in row:
        raise DataError(
            origin,
            f'has no "{answer}"',
            remedy="set answer in the task to the column of the right choice",
        )
    right = _right(row[answer], texts)
    if right is None:
        raise DataError(
            origin,
            f'"{answer}" is {quoted(row[answer])}, not one of the {len(texts)} choices',
            remedy="give the number of the right choice from 0, its letter, or its text",
        )
    return Question((Message("user", asked.strip()),), texts[right], origin, tuple(texts))


def _choices(row: Mapping[str, Any], choices: str | Sequence[str]) -> list[str]:
    if isinstance(choices, str) and isinstance(row.get(choices), list):
        return [str(choice).strip() for choice in row[choices]]
    # Rows may have different numbers of choices; after a gap, a column Q is not a choice.
    columns = ascii_uppercase if isinstance(choices, str) else choices
    given = takewhile(lambda column: row.get(column) not in (None, ""), columns)
    return [str(row[column]).strip() for column in given]


def _right(answer: Any, texts: Sequence[str]) -> int | None:
    """The index of the right choice: a number as it is, a text first as one of the choices, then as
    a letter, then as a number (tables hold numbers as text).
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
