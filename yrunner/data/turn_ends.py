"""Where a turn ends: behind the special token that ends it, for that has to be learned, too."""

from yrunner.data.conversation import FaultyRow
from yrunner.data.turn_marks import TurnMarks
from yrunner.errors import ModelError


def behind_end_mark(text: str, place: int, marks: TurnMarks) -> int:
    """Behind the end mark that follows a reply; `place` is where the reply ends.

    Raises `ModelError` where the template writes no special token there.
    """
    place = _behind_blanks(text, place)
    end = next((token for token in marks.special if text.startswith(token, place)), None)
    if end is None:
        raise _no_end_mark()
    return place + len(end)


def behind_last_end_mark(text: str, start: int, limit: int, marks: TurnMarks) -> int:
    """Behind the last end mark of a turn that holds more than a reply.

    The turn begins at `start`, the next one has a text at `limit`. Calls may hold special tokens
    of their own, so only those count that were seen to end a turn. Raises `FaultyRow` where there
    is none, and `ModelError` where there never is.
    """
    ends = [place + len(end) for end in marks.ends if (place := text.rfind(end, start, limit)) >= 0]
    if not ends:
        raise not_found() if marks.ends else _no_end_mark()
    return max(ends)


def behind_swallowed(text: str, end: int, marks: TurnMarks) -> int:
    """Behind the blanks that an end mark takes with it: they are one token together."""
    if marks.swallowing and text.endswith(marks.swallowing, 0, end):
        return _behind_blanks(text, end)
    return end


def not_found() -> FaultyRow:
    """The fault of a row whose turns cannot be told from what the template writes."""
    return FaultyRow(
        "the chat template changes a reply so that it cannot be found again", "template"
    )


def _no_end_mark() -> ModelError:
    return ModelError(
        "the chat template puts no end mark behind a reply, so a model would never learn to stop",
        remedy="set model.chat_template to a .jinja file that ends each turn with a special token",
    )


def _behind_blanks(text: str, place: int) -> int:
    while text[place : place + 1].isspace():
        place += 1
    return place
