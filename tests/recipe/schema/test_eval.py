"""What the section `eval` of a recipe refuses."""

import pytest
from pydantic import TypeAdapter, ValidationError

from yrunner.recipe.schema.eval import EvalSection, Generation, Task

TASK = TypeAdapter(Task)
ANSWER = {"kind": "answer", "name": "a", "side": "domain", "data": "rows.jsonl"}


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ({**ANSWER, "side": "other"}, "domain"),
        ({**ANSWER, "kind": "essay"}, "does not match any of the expected tags"),
        ({**ANSWER, "labels": ["a", "b"]}, "Extra inputs"),
        ({**ANSWER, "kind": "classify", "labels": ["one"]}, "one label leaves nothing to choose"),
        ({**ANSWER, "kind": "classify", "labels": ["b", "b"]}, '"b" is given twice'),
        ({**ANSWER, "kind": "format"}, "form"),
        (
            {**ANSWER, "kind": "format", "form": {"kind": "regex", "pattern": "["}},
            "not a valid regular",
        ),
        ({**ANSWER, "kind": "judge_by_rule", "rules": []}, "at least 1"),
        ({**ANSWER, "kind": "harness", "tasks": ["x"]}, "Extra inputs"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(task, reason):
    with pytest.raises(ValidationError, match=reason):
        TASK.validate_python(task)


def test_a_rule_is_one_of_two_and_has_a_unique_name():
    both = {"name": "r", "must_match": "a", "must_not_match": "b"}
    one = {"name": "r", "must_match": "a"}
    for rules, reason in (([both], "write two rules to use both"), ([one, one], 'the name "r"')):
        with pytest.raises(ValidationError, match=reason):
            TASK.validate_python({**ANSWER, "kind": "judge_by_rule", "rules": rules})


def test_two_tasks_cannot_have_the_same_name():
    with pytest.raises(ValidationError, match='two tasks have the name "a"'):
        EvalSection(tasks=[ANSWER, ANSWER])


def test_quality_tasks_are_on_the_quality_side_by_default():
    without = {key: value for key, value in ANSWER.items() if key != "side"}
    assert TASK.validate_python({**without, "kind": "quality"}).side == "quality"
    assert TASK.validate_python({**ANSWER, "kind": "quality"}).side == "domain"


def test_dynamic_writing_rises_from_sure_to_unsure():
    with pytest.raises(ValidationError, match="free_above must be above greedy_below"):
        TypeAdapter(Generation).validate_python(
            {"kind": "dynamic", "greedy_below": 2, "free_above": 2}
        )
