"""A value is found under one name only, and named so that a message can be read."""

import pytest

from yrunner.data.conversation import FaultyRow
from yrunner.data.formats.columns import filled, is_absent, quoted, renamed, shown


@pytest.mark.parametrize("value", [None, "", [], {}])
def test_null_and_empty_values_are_absent(value):
    assert is_absent(value)


@pytest.mark.parametrize("value", [0, False, 0.0, " ", [None], {"a": None}])
def test_everything_else_is_a_value(value):
    assert not is_absent(value)


def test_what_a_message_shows_is_short_and_printable():
    assert shown("a\x00\n\ud800\u202e灯") == r"a\x00\n\ud800\u202e灯"
    assert shown("x" * 41) == "x" * 40 + "..."
    assert (quoted("a"), quoted(None), quoted(b"")) == ('"a"', "null", "bytes")


def test_a_name_that_is_mapped_hides_the_names_that_mean_the_same():
    row = {"answer": 1, "response": 2, "reply": 3, "id": 4}
    synonyms = [("answer", "response"), ("question",)]
    assert renamed(row, {"answer": "reply"}, synonyms) == {"answer": 3, "id": 4}
    assert renamed(row, {"question": "reply"}, synonyms)["response"] == 2
    assert renamed(row, {}, synonyms) == row


def test_a_value_stands_under_one_of_its_names():
    names = ("answer", "response")
    assert filled({"answer": "", "response": "a"}, names) == "response"
    assert filled({"response": None}, names) == "response"
    with pytest.raises(FaultyRow, match='has both "answer" and "response"'):
        filled({"answer": "a", "response": "b"}, names)
