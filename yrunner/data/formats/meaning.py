"""Columns beside question and answer that change what a row teaches: obeyed, or refused by name.

A column that `columns` of the recipe maps to the answer is the user's choice, even in a file of
pairs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from yrunner.data.conversation import FaultyRow
from yrunner.data.formats.columns import is_absent, quoted

CHOSEN = ("chosen", "chosen_response", "chosen_answer", "chosen_messages", "preferred_output",
          "preferred_response", "positive_messages", "response_chosen", "response_j")  # fmt: skip
REJECTED = ("rejected", "rejected_response", "rejected_answer", "rejected_messages",
            "non_preferred_output", "dispreferred_response", "negative_messages",
            "response_rejected", "response_k")  # fmt: skip
RANKING = ("ranking", "margin")
MARKS = ("label", "kto_tag")
"""Whether the answer of a row is good, as in TRL's and LLaMA-Factory's data for KTO."""

WEIGHTS = ("weight", "loss_weight", "sample_weight", "loss_scale", "train")
"""Whether a row is learned from."""

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
CONTEXTS = ("context", "passage", "input", "history")
"""What a question may need; some formats read some of them."""

COLUMNS = (*CHOSEN, *REJECTED, *RANKING, *MARKS, *WEIGHTS, *MEDIA, *CONTEXTS)

ANSWER_OF = {
    "instruction": "output",
    "question": "answer",
    "query": "answer",
    "prompt": "response",
}
TURNS = ("messages", "conversations", "conversation")
ANSWERS = {*ANSWER_OF.values(), "completion", "text", *TURNS}

TRUTHS: dict[Any, bool] = {
    1: True,
    0: False,
    **dict.fromkeys(("true", "1", "desirable"), True),
    **dict.fromkeys(("false", "0", "undesirable"), False),
}
"""Values that say whether an answer is good; True equals 1."""


def check_meaning(row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    """Raise `FaultyRow` for a column that no format reads, but which changes what is learned."""
    reason = find_preference(row, columns)
    if reason is not None:
        raise FaultyRow(reason, "wrong_type")
    check_plain_meaning(row)


def check_plain_meaning(row: Mapping[str, Any]) -> None:
    """`check_meaning`, except for better and worse answers."""
    for column in MEDIA:
        if not is_absent(row.get(column)):
            raise FaultyRow(f'has "{column}", which is not supported', "wrong_type")
    for column in WEIGHTS:
        if column in row:
            _check_weight(column, row[column])


def _check_weight(column: str, value: Any) -> None:
    if column == "train" and not isinstance(value, bool):
        # Often the name of a split.
        return
    if isinstance(value, str):
        try:
            value = float(value) if value.strip() else None
        except ValueError:
            value = value.strip()
    if value is None or value == 1:
        return
    if value == 0:
        shown = "false" if isinstance(value, bool) else "0"
        reason = f'"{column}" is {shown}: the row is not to be learned; remove it'
    else:
        reason = (
            f'"{column}" is not 0 or 1, and rows are learned in full or not at all; remove the '
            "column to learn every row in full"
        )
    raise FaultyRow(reason, "wrong_type")


def find_preference(row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """Why a row with better and worse answers is not read; None for other rows.

    None, too, if `columns` names the answer to learn.
    """
    if not ANSWERS.isdisjoint(columns):
        return None
    pairs = [name for name in (*CHOSEN, *REJECTED) if not is_absent(row.get(name))]
    if pairs:
        names = [*pairs, *(name for name in RANKING if not is_absent(row.get(name)))]
        listed = " and ".join(f'"{name}"' for name in names)
        return f"has {listed}: better and worse answers{FOR_PREFERENCE}"
    ranked = find_ranked(row)
    return f'has ranked answers in "{ranked}"{FOR_PREFERENCE}' if ranked else None


FOR_PREFERENCE = ", which are for preference training (train.stage: preference)"


def find_ranked(row: Mapping[str, Any]) -> str | None:
    """The column with a list of answers, the best one first; None if there is none."""
    for name in ("output", "response", "answer", "completion"):
        answers = row.get(name)
        if isinstance(answers, list) and [type(it) for it in answers[:2]] == [str, str]:
            return name
    return None


def preference_remedy(row: Mapping[str, Any]) -> str:
    """How to learn the better answers of a file whose rows `find_preference` explains."""
    chosen = next((name for name in CHOSEN if not is_absent(row.get(name))), None)
    asking = next((name for name in ANSWER_OF if not is_absent(row.get(name))), None)
    turns = next((name for name in TURNS if isinstance(row.get(name), list)), None)
    if chosen is None:
        own = turns or next((name for name in ANSWERS if not is_absent(row.get(name))), None)
        if own is None or (turns is None and isinstance(row[own], list)):
            return "keep the best answer of each row, as text"
        return f"to train on {own} alone, set columns: {{{own}: {own}}} for this file"
    if is_whole_talk(row[chosen]):
        mapping = f"messages: {chosen}"
    elif asking is not None:
        mapping = f"{ANSWER_OF[asking]}: {chosen}"
    elif turns is not None:
        mapping = f"prompt: {turns}, response: {chosen}"
    elif isinstance(row[chosen], list):
        return f'to train on "{chosen}" alone, add its questions as a column "prompt"'
    else:
        return (
            f"to train on {chosen} alone as plain text (train.stage: cpt), set columns: "
            f"{{text: {chosen}}} for this file"
        )
    return f"to train on {chosen} alone, set columns: {{{mapping}}} for this file"


def is_whole_talk(value: Any) -> bool:
    """Whether a list of turns has a question, not only the reply."""
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return False
    speaker = str(value[0].get("role", value[0].get("from"))).lower()
    return speaker in ("system", "developer", "user", "human")


def find_marks(rows: Sequence[Mapping[str, Any]], *, texts: bool) -> tuple[str, ...]:
    """The columns of MARKS whose values in the first rows say whether an answer is good.

    A column `label` with any other value holds classes, as do numbers beside a plain text.
    """

    def is_mark(name: str, value: Any) -> bool:
        if is_absent(value) or isinstance(value, bool) or name != "label":
            return True
        return not texts and truth(value) is not None

    return tuple(name for name in MARKS if all(is_mark(name, row.get(name)) for row in rows))


def check_marks(row: Mapping[str, Any], marks: Sequence[str]) -> None:
    """Raise `FaultyRow` if a row is marked as a bad answer."""
    for name in marks:
        value = row.get(name)
        if is_absent(value) or truth(value):
            continue
        if truth(value) is None and name != "label":
            raise FaultyRow(f'"{name}" is {quoted(value)}, not true or false', "wrong_type")
        if truth(value) is False:
            reason = (
                f'"{name}" marks a bad answer, which only loss.kind: kto (train.stage: preference) '
                "can use; the other stages would learn it"
            )
            raise FaultyRow(reason, "wrong_type")


def truth(value: Any) -> bool | None:
    """Whether a value is true or false in the words of JSON, CSV and KTO; None for others."""
    if isinstance(value, str):
        value = value.strip().lower()
    elif not isinstance(value, (bool, int, float)):
        return None
    return TRUTHS.get(value)


def check_context(row: Mapping[str, Any], read: Sequence[str], columns: Mapping[str, str]) -> None:
    """Raise `FaultyRow` if a column is lost that the question may need; the format has `read`.

    A question that `columns` names is the user's choice.
    """
    asking = next((name for name in (*ANSWER_OF, *TURNS) if name in row and name in read), None)
    if asking is None or asking in columns:
        return
    lost = [name for name in CONTEXTS if name not in read and not is_absent(row.get(name))]
    if asking in TURNS:
        lost = [name for name in lost if name == "history"]
    if not lost:
        return
    answer = next((name for name in read if name in ANSWERS and name in row), "")
    answer = columns.get(answer, answer)
    ways = [f"to leave it out, set columns: {{{asking}: {asking}}}"]
    has_input = "input" in read and not is_absent(row.get("input"))
    if lost[0] != "history" and not has_input:
        reading = f"instruction: {asking}, input: {lost[0]}"
        reading += f", output: {answer}" if answer else ""
        ways.insert(0, f"to read it, set columns: {{{reading}}}")
    reason = f'has "{lost[0]}", which this format does not read; {"; ".join(ways)}'
    raise FaultyRow(reason, "wrong_type")
