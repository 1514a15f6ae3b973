"""Answers that have a form, and answers that keep rules."""

import json

import pytest

from yrunner.errors import DataError
from yrunner.evaluation.tasks import ALL_RULES, form_check, kept_rules
from yrunner.recipe.schema.eval import JsonForm, RegexForm, Rule

SCHEMA = {"type": "object", "required": ["years"], "properties": {"years": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ("Article 12.", True),
        (" Article 3. \n", True),
        ("<think>Article?</think>Article 3.", True),
        ("It is Article 3.", False),
        ("", False),
    ],
)
def test_a_regular_expression_matches_the_whole_answer(answer, valid):
    check = form_check(RegexForm(kind="regex", pattern=r"Article \d+\."))
    assert check(answer) is valid


def test_a_dot_matches_line_ends_too():
    assert form_check(RegexForm(kind="regex", pattern="a.*b"))("a\n\nb")


@pytest.mark.parametrize(
    ("answer", "is_json", "follows"),
    [
        ('{"years": 9}', True, True),
        ('<think>{</think> {"years": 9}', True, True),
        ('{"years": "九"}', True, False),
        ("[1, 2]", True, False),
        ('{"years": 9} 😀', False, False),
        ("```json\n{}\n```", False, False),
        ("NaN", False, False),
        ("[" * 100_000, False, False),
        ("", False, False),
    ],
)
def test_json_is_json_and_follows_its_schema(tmp_path, answer, is_json, follows):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    assert form_check(JsonForm(kind="json"))(answer) is is_json
    assert form_check(JsonForm(kind="json", json_schema=path))(answer) is follows


@pytest.mark.parametrize("content", ["{", '{"type": "objekt"}'])
def test_a_schema_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "schema.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"schema\.json: is no JSON Schema: .+\. Correct the"):
        form_check(JsonForm(kind="json", json_schema=path))


def test_rules_are_kept_one_by_one_and_all_together():
    rules = [
        Rule(name="cites", must_match=r"第\d+条"),
        Rule(name="promises nothing", must_not_match="保证|guarantee"),
    ]
    kept = kept_rules("根据第5条，保证退款。", rules)
    assert kept == {ALL_RULES: 0.0, "cites": 1.0, "promises nothing": 0.0}
    assert kept_rules("<think>保证</think>根据第5条。", rules)[ALL_RULES] == 1
    assert next(iter(kept)) == ALL_RULES
