"""Questions, and the reference answers that belong to them, as they stand in data files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yrunner.data.columns import filled, is_absent, text_of, type_name
from yrunner.data.conversation import Conversation, FaultyRow, Message
from yrunner.data.files import read_rows
from yrunner.data.reading import read_conversations
from yrunner.data.refusals import Refusal
from yrunner.data.rows import Damaged
from yrunner.data.turns import read_turns
from yrunner.errors import DataError, Origin

TURNS = ("messages", "conversations", "conversation")
ASKING = ("instruction", "question", "query", "prompt", *TURNS)
ANSWERING = ("output", "answer", "response", "completion")

EVERY_QUESTION_COUNTS = "mend the row; every question counts"


@dataclass(frozen=True)
class Question:
    """What is asked (and all that was said before), and the answer that is right."""

    messages: tuple[Message, ...]
    reference: str
    """Empty where none is needed, and none was given."""
    origin: Origin
    choices: tuple[str, ...] = ()
    """What can be chosen from, where that differs from question to question."""

    @property
    def text(self) -> str:
        """The last thing that was said, for tables; of a plain text its beginning."""
        return self.messages[-1].content if self.messages else self.reference[:200]


def question_of(conversation: Conversation) -> Question:
    """The last assistant turn is the reference, everything before it is the question.

    A plain text is a reference that nobody asked for.
    """
    *messages, reply = conversation.messages
    return Question(tuple(messages), reply.content, conversation.origin)


def read_questions(file: Path) -> list[Question]:
    """The conversations of a file as questions. Raises `DataError` at the first faulty row."""
    _refuse_without_references(file)
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
            raise DataError(origin, str(fault), remedy=EVERY_QUESTION_COUNTS) from fault
    return questions


def _conversations(file: Path) -> Iterator[Conversation]:
    for row in read_conversations(file).rows:
        if isinstance(row, Refusal):
            raise DataError(row.origin, row.reason, remedy=EVERY_QUESTION_COUNTS)
        yield row


def _refuse_without_references(file: Path) -> None:
    if _only_asks(_first_row(file)):
        columns = ", ".join(ANSWERING[:-1])
        raise DataError(
            file,
            "has questions without reference answers",
            remedy=f"add them in a column such as {columns}, or as a last assistant message; "
            "the kinds format, judge_by_rule and quality need none",
        )


def _first_row(file: Path) -> Any:
    for _, row in read_rows(file):
        return row
    raise DataError(file, "holds no rows, there is nothing to ask", remedy="add some, or leave it")


def _only_asks(row: Any) -> bool:
    """Whether a row asks something, and nobody answers."""
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
    """What a row without an answer asks. Raises `FaultyRow` where that is nothing."""
    if isinstance(row, Damaged):
        raise FaultyRow(str(row), "unreadable")
    if not isinstance(row, Mapping):
        raise FaultyRow(f"is {type_name(row)}, not an object with named fields", "not_an_object")
    if row.keys().isdisjoint(ASKING):
        raise FaultyRow("asks nothing", "missing_field")
    column = filled(row, ASKING)
    if isinstance(row[column], list):
        messages = read_turns(row[column], column)
    else:
        parts = [text_of(row, name) for name in (column, "input") if not is_absent(row.get(name))]
        messages = (Message("user", "\n".join(parts)),)
    if messages[-1].role != "user" or not messages[-1].content.strip():
        raise FaultyRow(f'"{column}" asks nothing', "empty")
    if is_absent(row.get("system")):
        return messages
    return (Message("system", text_of(row, "system")), *messages)
