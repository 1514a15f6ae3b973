"""Thinking in replies: what the template loses, what is unbalanced, and the answer behind it.

Only whitespace may be lost, and the marks around thinking may change. Templates drop the thinking
of earlier replies; that of the last one is what a thinking model learns from.
"""

import re
from collections.abc import Sequence

from yrunner.data.conversation import FaultyRow

THINKING_MARK = re.compile(
    r"[<\[◁](?:(?P<close>/?)(?P<name>(?:\w+:)?(?:think(?:ing)?|thought|reasoning))[>\]▷]"
    r"|\|(?:begin|(?P<end>end))_of_(?P<other>thought|thinking|reasoning)\|>)",
    re.IGNORECASE,
)
"""Marks around thinking: <think>, [THINK], ◁think▷, <reasoning>, <|begin_of_thought|> ..."""

WORDS = ("think", "thought", "reasoning")
"""One of them is in every mark; looking for them is faster."""

CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
QUOTES = "\"'“”‘’«»「」『』"
MENTION = re.compile(r"[\w,][^\S\n]+\Z")
"""A mark in the midst of a sentence is only mentioned."""


def is_thinking_mark(text: str) -> bool:
    """Whether the text is a mark around thinking."""
    return THINKING_MARK.fullmatch(text) is not None


def lost_text(reply: str, shown: str, *, is_last: bool) -> FaultyRow | None:
    """The fault of a row whose reply is not all in `shown`, what the template writes of it.

    Unless the reply `is_last`, its thinking may be missing.
    """
    core = reply.strip()
    if shown.startswith(core) or core in shown:
        return None
    which = "the last reply" if is_last else "an earlier reply"
    changed = FaultyRow(f"the chat template changes or removes text of {which}", "altered")
    if len(_marks(core)) < len(THINKING_MARK.findall(core)):
        return changed  # it took a mark that is only mentioned for one around thinking
    shown = _squashed(shown)
    if _squashed(core) in shown:
        return None
    block = _thinking_block(core)
    if block is None:
        return changed
    thinking, answer = map(_squashed, block)
    place = shown.find(thinking) + len(thinking) if thinking in shown else -1
    if thinking and place >= 0:
        # Some mark must separate the two.
        return None if shown.find(answer, place + 1) > place or not answer else changed
    if answer not in shown:
        return changed
    if thinking and is_last:
        return FaultyRow("the chat template removes the thinking of the last reply", "altered")
    return None


def unbalanced_thinking(reply: str, *, opened: bool, is_last: bool) -> FaultyRow | None:
    """The fault of a row whose reply has a thinking mark without its counterpart, or twice.

    `opened`: the prompt opens a thinking block. Marks in code, in quotes or in the midst of a
    sentence are no block, unless they have a counterpart.
    """
    closes_by_name: dict[str, list[bool]] = {}
    for mark in _marks(reply):
        closes_by_name.setdefault(_name(mark), []).append(_closes(mark))
    which = "the last reply" if is_last else "an earlier reply"
    for closes in closes_by_name.values():
        if closes == [False, True] or (opened and closes == [True]):
            continue
        if len(closes) > 2:
            what = "has thinking marks more than once"
        elif closes[0]:
            what = "closes a thinking block that it never opened"
        else:
            what = "opens a thinking block and never closes it"
        return FaultyRow(f"{which} {what}", "thinking")
    return None


def answer_behind_thinking(reply: str, *, opened: bool = False) -> str | None:
    """What a reply says behind its thinking; None if its thinking never ends.

    `opened`: the prompt opens a thinking block. A mark that is only mentioned is text.
    """
    ends = [mark.end() for mark in _marks(reply) if _closes(mark)]
    if opened and not ends:
        return None
    answer = reply[ends[-1] if ends else 0 :].strip()
    begins = THINKING_MARK.match(answer)
    return None if begins and not _closes(begins) else answer


def opens_thinking(prompt_end: str) -> bool:
    """Whether a prompt with this end leaves the thinking block open for the model."""
    return bool(opened_thinking(prompt_end))


def opened_thinking(prompt_end: str) -> str:
    """The mark of the thinking block that a prompt with this end leaves open, or nothing."""
    marks = list(THINKING_MARK.finditer(prompt_end))
    return marks[-1][0] if marks and not _closes(marks[-1]) else ""


def closes_thinking(text: str) -> bool:
    """Whether the last mark around thinking in a text closes a block."""
    marks = list(THINKING_MARK.finditer(text))
    return bool(marks) and _closes(marks[-1])


def _squashed(text: str) -> str:
    return "".join(text.split())


def _thinking_block(reply: str) -> tuple[str, str] | None:
    """Thinking and answer of a reply with one block, at its start."""
    marks = list(THINKING_MARK.finditer(reply))
    if len(marks) == 1 and _closes(marks[0]):
        return reply[: marks[0].start()], reply[marks[0].end() :]
    if [_closes(mark) for mark in marks] != [False, True] or marks[0].start():
        return None
    return reply[marks[0].end() : marks[1].start()], reply[marks[1].end() :]


def _marks(reply: str) -> Sequence[re.Match[str]]:
    """The thinking marks of a reply, without those that are only mentioned."""
    lowered = reply.lower()
    if not any(word in lowered for word in WORDS):
        return []
    marks = list(THINKING_MARK.finditer(reply))
    if not marks or [_closes(mark) for mark in marks] == [False, True]:
        return marks
    code = [found.span() for found in CODE.finditer(reply)]
    return [
        mark
        for mark in marks
        if not any(start < mark.start() < end for start, end in code)
        and reply[mark.start() - 1 : mark.start()] not in tuple(QUOTES)
        and not MENTION.search(reply, reply.rfind("\n", 0, mark.start()) + 1, mark.start())
    ]


def _closes(mark: re.Match[str]) -> bool:
    return bool(mark["close"] or mark["end"])


def _name(mark: re.Match[str]) -> str:
    return str(mark["name"] or mark["other"]).lower()
