"""The form of an answer: tags graded in parts, JSON against a schema."""

import json

import pytest

from tests.rewards.conftest import answer
from yrunner.rewards.form import form_parts

GOOD = "<reasoning>\nbecause\n</reasoning>\n<answer>\n4\n</answer>\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, 1),
        ("<reasoning>a</reasoning><answer>4</answer>", 1),
        ("  <reasoning>a</reasoning> <answer>4</answer>  ", 1),
        ("<think>hm</think>" + GOOD, 1),
        ("", 0),
        ("4", 0),
        # opens once, twice
        ("<reasoning><answer>", 2 / 8),
        ("<answer>4</answer>", 3 / 8),
        ("<answer></answer>", 2 / 8),
        # all but the order, and what is around
        ("<answer>4</answer><reasoning>a</reasoning>", 6 / 8),
        ("<reasoning>a<answer>4</answer></reasoning>", 6 / 8),
        # all but what is around
        ("So: " + GOOD, 7 / 8),
        (GOOD + "Done.", 7 / 8),
        # the answer is given twice: only the reasoning is right
        (GOOD + "<answer>5</answer>", 3 / 8),
        # an empty answer
        ("<reasoning>a</reasoning><answer> </answer>", 7 / 8),
        ("</answer>4<answer>", 1 / 8),
    ],
)
def test_xml_is_graded_in_parts(score, text, expected):
    assert score(text, kind="xml") == pytest.approx(expected)
    assert score(text, kind="xml", grade="whole") == (expected == 1)


def test_the_tags_are_those_of_the_recipe(score):
    assert score("<think>a</think><b>c</b>", kind="xml", tags=["think", "b"]) == 1
    assert score("<b>c</b>", "c", kind="xml", tags=["b"]) == [1, 0]
    assert len(form_parts("", ["b"])) == 4
    assert score("<a.b>c</a.b>", "<aXb>c</aXb>", kind="xml", tags=["a.b"]) == [1, 0]


SCHEMA = {"type": "object", "required": ["total"], "properties": {"total": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("text", "whole", "parts"),
    [
        ('{"total": 3}', 1, 1),
        (' {"total": 3}\n', 1, 1),
        ('<think>{}</think>{"total": 3}', 1, 1),
        ('{"total": "3"}', 0, 0.5),
        ("[]", 0, 0.5),
        ('{"total": 3', 0, 0),
        ('{"total": NaN}', 0, 0),
        ("", 0, 0),
        ("[" * 100_000, 0, 0),
    ],
)
def test_json_is_held_to_its_schema(score, text, whole, parts, tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    in_row = {"schema": json.dumps(SCHEMA), "form": SCHEMA}
    for keys in ({"json_schema": SCHEMA}, {"file": file}, {}, {"column": "form"}):
        given = answer(text, **in_row)
        assert score(given, kind="json_schema", **keys) == whole
        assert score(given, kind="json_schema", grade="parts", **keys) == parts


def test_each_row_may_have_another_schema(score):
    given = [
        answer('"a"', schema={"type": "string"}),
        answer('"a"', schema={"type": "number"}),
        answer("1", schema={"$ref": "#/$defs/n", "$defs": {"n": {"type": "number"}}}),
    ]
    assert score(*given, kind="json_schema") == [1, 0, 1]
