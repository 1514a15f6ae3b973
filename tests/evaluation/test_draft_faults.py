"""What is dropped of a model's own rows: cut off, empty, stuck, and said before."""

import pytest

from yrunner.data.conversation import Message
from yrunner.evaluation.self_replay import ALIKE, Draft, SeenTexts, find_fault, shingles_of

GOOD = "What is the third letter of the word harbour, and which ones come behind it?"


def draft(*contents, finished=True):
    roles = ("user", "assistant") if len(contents) == 2 else ("text",)
    messages = (Message(role, text) for role, text in zip(roles, contents, strict=True))
    return Draft(0, tuple(messages), finished)


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (draft(GOOD, "It is r, then b, o, u and r again."), None),
        (draft(GOOD, "It is r, then", finished=False), "unfinished"),
        (draft(GOOD, ""), "empty"),
        (draft("", "Yes."), "empty"),
        (draft(GOOD, "It is r and then b and " * 12), "loop"),
        (draft("问题是什么？", "港口港口港口" * 10), "loop"),
        (draft("两加二是多少？", "二加二等于四。"), None),
        (draft("A text of its own, with an end."), None),
    ],
)
def test_a_draft_is_dropped_for_what_is_wrong_with_it(found, fault):
    assert find_fault(found, SeenTexts()) == fault


def test_what_was_said_before_is_a_duplicate_even_with_another_word():
    known = SeenTexts()
    known.add("What is the capital of the land of Aru? " * 3)
    known.add(GOOD + "\nIt is r.")
    assert find_fault(draft(GOOD, "It is r."), known) == "duplicate"
    assert find_fault(draft(GOOD.lower(), "it is R!"), known) == "duplicate"
    assert find_fault(draft(GOOD, "It is b."), known) == "duplicate"
    other = GOOD.replace("harbour", "market").replace("third", "first")
    assert find_fault(draft(other, "It is m."), known) is None


def test_likeness_is_the_share_of_the_3_grams_that_both_have():
    texts = ["a b c d e f", "a b c d e g", "b c d e f", "c a", "一二三四五", "一二三四六"]
    for first in texts:
        known = SeenTexts()
        known.add(first)
        for second in texts:
            mine, theirs = shingles_of(first), shingles_of(second)
            assert known.has(second) == (len(mine & theirs) / len(mine | theirs) >= ALIKE)
