"""Turn rows with better and worse answers, or with marks for KTO, into conversations.

Each side of a pair is the whole conversation that it ends: the common prompt, then its own turns,
from which alone it is learned.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

from yrunner.data.conversation import Answers, Conversation, FaultyRow, Message
from yrunner.data.dataset.row_report import Refusal
from yrunner.data.formats.columns import (
    filled,
    is_absent,
    quoted,
    shown,
    text_of,
)
from yrunner.data.formats.formats import (
    ASKING,
    FORMATS,
    ROWS_TO_DETECT,
    TURN_COLUMNS,
    Messages,
    RawRow,
    ReadFile,
    Reading,
    alpaca_question,
    as_turns,
    check_all_characters,
    check_any_readable,
    check_columns,
    detect,
    known_columns,
    read_row,
    under_our_names,
    with_names,
    with_system,
)
from yrunner.data.formats.meaning import (
    CHOSEN,
    MARKS,
    REJECTED,
    WEIGHTS,
    check_context,
    check_plain_meaning,
    find_ranked,
    is_whole_talk,
    truth,
)
from yrunner.data.formats.turns import (
    check_turns,
    find_tools,
    read_history,
    read_turns,
    with_turns,
)
from yrunner.data.readers.files import notes_on, read_rows
from yrunner.data.readers.text import Advance, Damaged, FileRow
from yrunner.errors import DataError, Origin

Answer = tuple[str, Messages]
"""The column of an answer, and its turns: those of the reply, or a whole conversation."""

ANSWERING = {
    name: names
    for name, data_format in FORMATS.items()
    for names in data_format.needed[1:]
    if name in ASKING
}
"""The answer of a row without a column for the better one."""

MARK_WORDS: dict[Any, bool] = {
    **dict.fromkeys(("good", "yes", "chosen", "up", "+1"), True),
    **dict.fromkeys(("bad", "no", "rejected", "down", "-1", -1), False),
}
"""Values of marks, beside those of `truth`: in other stages they may be classes."""

SPOKEN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
"""How Anthropic's texts name who speaks."""
SPOKEN_TEXT = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)

END_BY_HAND = re.compile(
    r"(?:<\|[^<>|\s]{1,30}\|>|<｜[^<>｜\s]{1,30}｜>|</s>|<eos>|<end_of_turn>)\s*\Z"
)


def has_end_by_hand(talk: Conversation) -> bool:
    """Whether an end mark of any model is written behind the last reply."""
    return END_BY_HAND.search(talk.messages[-1].content) is not None


def read_answers(
    file: Path, reading: Reading, *, rated: bool = False, advance: Advance | None = None
) -> ReadFile[Answers]:
    """Open a data file; each row becomes the conversations that it teaches, or a refusal.

    These are the one with the better answer and the one with the worse; if `rated`, in a file of
    marked answers, one conversation. Raises `DataError` if the file cannot be read, or if most of
    its rows have no such answers.
    """
    rows = map(with_names, read_rows(file, document=reading.document, advance=advance))
    first = list(islice(rows, ROWS_TO_DETECT))
    check_any_readable(first, file)
    named = [
        (origin, _leniently(row, reading.columns))
        for origin, row in first
        if not isinstance(row, Damaged)
    ]
    pairs = [row for _, row in named if _has_pair(row)]
    is_marked = rated and len(pairs) * 2 <= len(named)
    others = [place for place in named if not (_has_mark if is_marked else _has_pair)(place[1])]
    if len(others) * 2 >= len(named):
        raise _nothing_to_prefer(*others[0], rated=rated)
    format_name = reading.format
    if format_name == "auto":
        format_name = (
            detect(first, file, reading)
            if is_marked
            else Counter(map(_format_of_pair, pairs)).most_common(1)[0][0]
        )
    known = (*known_columns(format_name), *(MARKS if is_marked else (*CHOSEN, *REJECTED)))
    check_columns(file, reading, format_name, known)
    unread = _unread([row for _, row in named], format_name, known)
    answers = _rows(chain(first, rows), format_name, reading.columns, is_marked=is_marked)
    return ReadFile(format_name, unread, tuple(notes_on(file)), answers)


def _leniently(row: Any, columns: Mapping[str, str]) -> RawRow:
    """The row as it is read, to detect the format; empty if it is not an object."""
    try:
        return under_our_names(with_turns(row), columns)
    except FaultyRow:
        return under_our_names(row, columns) if isinstance(row, Mapping) else {}


def _has_pair(row: RawRow) -> bool:
    given = any(not is_absent(row.get(name)) for name in (*CHOSEN, *REJECTED))
    return given or find_ranked(row) is not None


def _has_mark(row: RawRow) -> bool:
    return any(_is_good(row.get(name)) is not None for name in MARKS)


def _is_good(value: Any) -> bool | None:
    """Whether a mark says that an answer is good; None for a value that does not say it."""
    known = truth(value)
    if known is not None or isinstance(value, bool):
        return known
    word = value.strip().lower() if isinstance(value, str) else value
    return MARK_WORDS.get(word) if isinstance(word, (str, int, float)) else None


def _nothing_to_prefer(origin: Origin, row: RawRow, *, rated: bool) -> DataError:
    """The error of a file whose rows, such as this one, have no answers of different worth."""
    found = ", ".join(sorted(shown(str(name)) for name in row)[:12]) or "none"
    what = "has no better and worse answers" + rated * f", and no mark ({' or '.join(MARKS)})"
    mark = next((name for name in MARKS if _is_good(row.get(name)) is not None), None)
    remedy = f'to learn from "{mark}", set train.stage to preference and loss.kind to kto'
    unclear = next((name for name in MARKS if not is_absent(row.get(name))), None)
    if rated and unclear is not None:
        what = f'"{unclear}" is {quoted(row[unclear])}, not true or false, and no worse answer'
        remedy = f"write true or false into {unclear}"
    elif mark is None:
        names = f"{{chosen: ..., rejected: ...}}{rated * ' or {label: ...}'}"
        remedy = f"map them with columns: {names}, or set train.stage to sft for single answers"
    return DataError(origin, f"{what}; its columns are {found}", remedy=remedy)


def _format_of_pair(row: RawRow) -> str:
    sides = [row[name] for name in (*CHOSEN, *REJECTED) if not is_absent(row.get(name))]
    if sides and all(map(is_whole_talk, sides)):
        return "messages"
    filled_names = {name for name, value in row.items() if not is_absent(value)}
    for names in (filled_names, row.keys()):
        found = [name for name, asking in ASKING.items() if not names.isdisjoint(asking)]
        if found:
            return found[0]
    return "text"


def _unread(rows: Sequence[RawRow], format_name: str, known: Sequence[str]) -> tuple[str, ...]:
    read = {*known, *WEIGHTS}
    if any(not is_absent(row.get(name)) for row in rows for name in CHOSEN if name in known):
        read -= set(ANSWERING.get(format_name, ()))
    return tuple(sorted({shown(str(name)) for row in rows for name in row if name not in read}))


def _rows(
    rows: Iterator[FileRow], format_name: str, columns: Mapping[str, str], *, is_marked: bool
) -> Iterator[Answers | Refusal]:
    read = _read_marked if is_marked else _read_pair
    for origin, row in rows:
        if isinstance(row, Damaged):
            yield Refusal(origin, "unreadable", str(row))
            continue
        try:
            yield read(with_turns(row), format_name, columns, origin)
        except FaultyRow as fault:
            yield Refusal(origin, fault.kind, str(fault))


def _read_marked(
    row: RawRow, format_name: str, columns: Mapping[str, str], origin: Origin
) -> Answers:
    """A conversation whose last answer is marked good or bad."""
    named = under_our_names(row, columns)
    if _has_pair(named):
        reason = "has better and worse answers, but the other rows have marks"
        raise FaultyRow(reason, "wrong_type")
    messages, tools = read_row(row, format_name, columns)
    if messages[0].role == "text":
        raise FaultyRow("is a plain text, which answers nothing", "missing_field")
    row = named
    given = [name for name in MARKS if not is_absent(row.get(name))]
    if not given:
        theirs = " or ".join(f'"{columns.get(name, name)}"' for name in MARKS)
        raise FaultyRow(f"has no {theirs}, which says whether its answer is good", "missing_field")
    mark = filled(row, given)
    is_good = _is_good(row[mark])
    if is_good is None:
        raise FaultyRow(f'"{mark}" is {quoted(row[mark])}, not true or false', "wrong_type")
    own = _first_of_answer(messages)
    return (Conversation(_learned_from(messages, own), origin, tools, is_good),)


def _read_pair(
    row: RawRow, format_name: str, columns: Mapping[str, str], origin: Origin
) -> Answers:
    """The conversations that end with the better and with the worse answer."""
    row = under_our_names(row, columns)
    check_plain_meaning(row)
    better, worse, asked = _find_answers(row, format_name, columns)
    check_context(row, (*known_columns(format_name), *CHOSEN, *REJECTED), columns)
    is_talk = _is_whole(better)
    tools = find_tools(row, (better[0],) if is_talk else TURN_COLUMNS)
    chosen, rejected = (_side(row, asked, answer) for answer in (better, worse))
    shared = _count_shared(chosen, rejected)
    # Blanks around a message may differ; the prompt is the same all the same.
    rejected = (*chosen[:shared], *rejected[shared:])
    return (
        Conversation(_learned_from(chosen, shared), origin, tools, is_desirable=True),
        Conversation(_learned_from(rejected, shared), origin, tools, is_desirable=False),
    )


def _find_answers(
    row: RawRow, format_name: str, columns: Mapping[str, str]
) -> tuple[Answer, Answer, Messages]:
    """The better answer, the worse one, and what they answer: empty if they hold it."""
    is_spoken = isinstance(row.get("prompt"), str) and _is_spoken(row["prompt"])
    is_spoken |= format_name == "text"
    better, worse = (_given(row, names, is_spoken=is_spoken) for names in (CHOSEN, REJECTED))
    ranked = find_ranked(row)
    if better is None and worse is None and ranked is not None:
        number = len(row[ranked])
        if number != 2:
            reason = f'"{ranked}" has {number} ranked answers; keep two, the better one first'
            raise FaultyRow(reason, "wrong_type")
        better, worse = ((ranked, _turns_of(text, ranked)) for text in row[ranked])
    if worse is None:
        raise _missing(row, REJECTED, columns)
    if better is None:
        better = _given(row, ANSWERING.get(format_name, ()))
    asked = _asked(row, format_name, columns, needed=not (better and _is_whole(better)))
    if asked and asked[-1].role == "assistant":
        reply, asked_before = asked[-1], asked[:-1]
        if better is None:
            return (_column_of(row, format_name), (reply,)), worse, asked_before
        if any(_is_same(reply, turns[-1]) for _, turns in (better, worse)):
            return better, worse, asked_before
    if better is None:
        raise _missing(row, CHOSEN, columns)
    whole = [answer[1] for answer in (better, worse) if _is_whole(answer)]
    if len(whole) == 1 and not asked:
        asked = whole[0][: _first_of_answer(whole[0])]
    return better, worse, asked


def _given(row: RawRow, names: Sequence[str], *, is_spoken: bool = False) -> Answer | None:
    """The answer in one of these columns; None if they are empty."""
    given = [name for name in names if not is_absent(row.get(name))]
    if not given:
        return None
    column = filled(row, given)
    if is_spoken and isinstance(row[column], str) and _is_spoken(row[column]):
        return column, _spoken_turns(row[column])
    return column, _turns_of(row[column], column)


def _turns_of(value: Any, column: str) -> Messages:
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        if len(value) > 1:
            reason = f'"{column}" has {len(value)} answers; write a row for each'
            raise FaultyRow(reason, "wrong_type")
        (value,) = value
    if isinstance(value, str) and not value.strip():
        raise FaultyRow(f'"{column}" is empty', "empty")
    try:
        return as_turns(value, column, "assistant")
    except FaultyRow as fault:
        raise _within(column, fault) from fault


def _within(column: str, fault: FaultyRow) -> FaultyRow:
    """The fault, with the column of the answer that has it."""
    reason = str(fault)
    return FaultyRow(
        reason if reason.startswith(f'"{column}"') else f'"{column}": {reason}', fault.kind
    )


def _missing(row: RawRow, names: Sequence[str], columns: Mapping[str, str]) -> FaultyRow:
    empty = next((name for name in names if name in row), None)
    if empty is not None:
        return FaultyRow(f'"{empty}" is empty', "empty")
    return FaultyRow(f'has no "{columns.get(names[0], names[0])}"', "missing_field")


def _asked(row: RawRow, format_name: str, columns: Mapping[str, str], *, needed: bool) -> Messages:
    """What the answers of a row answer. Raises `FaultyRow` if that is needed, but missing."""
    names = ASKING.get(format_name, ())
    if not needed and all(is_absent(row.get(name)) for name in names):
        return ()
    if not names:
        reason = 'has no "prompt", and its answers do not name who speaks (Human: and Assistant:)'
        raise FaultyRow(reason, "missing_field")
    if row.keys().isdisjoint(names):
        theirs = " or ".join(f'"{columns.get(name, name)}"' for name in names)
        raise FaultyRow(f"has no {theirs}", "missing_field")
    column = filled(row, names)
    if column != "instruction" and is_absent(row[column]):
        raise FaultyRow(f'"{column}" is empty', "empty")
    if column in TURN_COLUMNS and not isinstance(row[column], str):
        turns = as_turns(row[column], column, "user")
    elif column in ("conversations", "conversation", "messages"):
        return read_turns(row[column], column)
    elif column == "prompt" and _is_spoken(row[column]):
        turns = _spoken_turns(row[column])
    else:
        question = alpaca_question(row) if column == "instruction" else text_of(row, column)
        if not question.strip():
            raise FaultyRow(f'"{column}" is empty', "empty")
        turns = (Message("user", question),)
    if turns and turns[-1].role == "assistant" and not turns[-1].content:
        turns = turns[:-1]
    return (*read_history(row.get("history")), *turns) if "history" in row else turns


def _column_of(row: RawRow, format_name: str) -> str:
    return filled(row, ASKING[format_name])


def _is_spoken(text: str) -> bool:
    return SPOKEN_TEXT.match(text) is not None


def _spoken_turns(text: str) -> Messages:
    """The turns of a text that names who speaks; the last may be empty."""
    _, *parts = SPOKEN.split(text)
    return tuple(
        Message("user" if speaker == "Human" else "assistant", content.strip())
        for speaker, content in zip(parts[0::2], parts[1::2], strict=True)
    )


def _is_whole(answer: Answer) -> bool:
    """Whether the turns of an answer begin with what it answers."""
    return answer[1][0].role in ("system", "user")


def _side(row: RawRow, asked: Messages, answer: Answer) -> Messages:
    """The conversation that ends with an answer. Raises `FaultyRow`, with the answer's column."""
    column, turns = answer
    try:
        if _is_whole(answer):
            questions = {turn.content.strip() for turn in asked if turn.role == "user"}
            if not questions <= {turn.content.strip() for turn in turns if turn.role == "user"}:
                raise FaultyRow("is a conversation with another prompt", "different_prompts")
        else:
            turns = (*asked, *turns)
        turns = with_system(row, turns)
        check_turns(turns)
        check_all_characters(turns)
    except FaultyRow as fault:
        raise _within(column, fault) from fault
    return turns


def _count_shared(chosen: Messages, rejected: Messages) -> int:
    """The number of messages before the answers. Raises `FaultyRow` for sides that are no pair."""
    same = takewhile(lambda both: _is_same(*both), zip(chosen, rejected, strict=False))
    num_same = sum(1 for _ in same)
    if num_same == len(chosen) == len(rejected):
        raise FaultyRow("both answers are the same", "equal_answers")
    first = max(_first_of_answer(chosen), _first_of_answer(rejected))
    if num_same < first:
        reason = f"the answers have different prompts: they differ from message {num_same + 1} on"
        raise FaultyRow(reason, "different_prompts")
    return min(num_same, len(chosen) - 1, len(rejected) - 1)


def _first_of_answer(messages: Messages) -> int:
    """The number of messages up to the last question; 0 without one."""
    numbers = [number for number, it in enumerate(messages, start=1) if it.role == "user"]
    return max(numbers, default=0)


def _is_same(one: Message, other: Message) -> bool:
    left, right = (replace(it, content=it.content.strip(), learned=True) for it in (one, other))
    return left == right


def _learned_from(messages: Messages, first: int) -> Messages:
    """The messages; replies before message `first` are context.

    Raises `FaultyRow` if no other reply is learned.
    """
    if not any(it.learned for it in messages[first:] if it.role == "assistant"):
        reason = "its answer is excluded, by train: false, weight: 0 or the like"
        raise FaultyRow(reason, "no_targets")
    context = [
        replace(it, learned=False) if it.role == "assistant" else it for it in messages[:first]
    ]
    return (*context, *messages[first:])
