"""Whether an answer has a form: a regular expression, JSON, a JSON Schema, or its own rules."""

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, assert_never

from jsonschema import Draft202012Validator, SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for

from yrunner.errors import DataError
from yrunner.evaluation.text_metrics import without_thinking
from yrunner.recipe.schema_eval import Form, JsonForm, RegexForm, Rule

ALL_RULES = "all rules"

Check = Callable[[str], bool]
"""Whether an answer, without thinking and outer blanks, is valid."""


def form_check(form: Form) -> Check:
    """The check of a form. Raises `DataError` where its JSON Schema cannot be used."""
    match form:
        case RegexForm():
            pattern = re.compile(form.pattern, re.DOTALL)
            return lambda answer: pattern.fullmatch(without_thinking(answer)) is not None
        case JsonForm():
            return partial(_is_json, validator=_validator(form))
        case _:
            assert_never(form)


def kept_rules(answer: str, rules: Sequence[Rule]) -> dict[str, float]:
    """1 for each rule that the answer keeps, by its name, and 0 for the others; first, for all."""
    text = without_thinking(answer)
    kept = {rule.name: float(_keeps(text, rule)) for rule in rules}
    return {ALL_RULES: float(all(kept.values())), **kept}


def _keeps(text: str, rule: Rule) -> bool:
    if rule.must_match is not None:
        return re.search(rule.must_match, text) is not None
    assert rule.must_not_match is not None, "the schema wants one of the two"
    return re.search(rule.must_not_match, text) is None


def _is_json(answer: str, validator: Validator | None) -> bool:
    try:
        value = json.loads(without_thinking(answer), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return validator is None or bool(validator.is_valid(value))


def _refuse_constant(name: str) -> Any:
    # Python reads NaN and Infinity, which no other reader of JSON does.
    raise ValueError(f"{name} is no JSON")


def _validator(form: JsonForm) -> Validator | None:
    if form.json_schema is None:
        return None
    try:
        schema = json.loads(form.json_schema.read_text("utf-8"))
        kind = validator_for(schema, Draft202012Validator)
        kind.check_schema(schema)
    except (ValueError, SchemaError) as error:
        reason = error.message if isinstance(error, SchemaError) else str(error)
        raise DataError(
            form.json_schema, f"is no JSON Schema: {reason}", remedy="correct the schema"
        ) from error
    return kind(schema)
