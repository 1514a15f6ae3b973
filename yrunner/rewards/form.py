"""Rewards for the form of an answer: tags in their order, JSON that matches a schema."""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for

from yrunner.data.chat.template import THINK_CLOSE
from yrunner.recipe.schema.rewards import JsonSchemaReward, XmlReward
from yrunner.rewards.completion import Completion
from yrunner.rewards.text import OneScore, read_answer
from yrunner.text_files import read_json


def xml_score(section: XmlReward) -> OneScore:
    """The share of the form that is right; with `grade: whole`, whether all of it is."""

    def score(completion: Completion) -> float:
        # Some models think on their own first, unless "think" is one of the tags.
        text = completion.text
        if "think" not in section.tags:
            text = text.rpartition(THINK_CLOSE)[2].strip()
        parts = form_parts(text, section.tags)
        return sum(parts) / len(parts) if section.grade == "parts" else float(all(parts))

    return score


def form_parts(text: str, tags: Sequence[str]) -> list[bool]:
    """What of the form is right.

    For each tag: it opens once, it closes once behind that, something is inside. Then whether the
    tags are in order, if there are several; and whether nothing else is around them.
    """
    spans = [_span(text, tag) for tag in tags]
    parts = []
    for tag, span in zip(tags, spans, strict=True):
        parts.append(text.count(f"<{tag}>") == 1)
        parts.append(span is not None)
        parts.append(span is not None and bool(text[slice(*span.span(1))].strip()))
    found = [span for span in spans if span is not None]
    whole = len(found) == len(tags)
    in_order = whole and all(one.end() <= other.start() for one, other in pairwise(found))
    if len(tags) > 1:
        parts.append(in_order)
    outside = text
    for span in found:
        outside = outside.replace(span[0], "", 1)
    parts.append(in_order and not outside.strip())
    return parts


def _span(text: str, tag: str) -> re.Match[str] | None:
    """Where a tag opens and closes, each only once."""
    if text.count(f"<{tag}>") != 1 or text.count(f"</{tag}>") != 1:
        return None
    return re.search(rf"<{re.escape(tag)}>(.*)</{re.escape(tag)}>", text, re.DOTALL)


def json_schema_score(section: JsonSchemaReward) -> OneScore:
    """Whether an answer is JSON that matches the schema of the section or of its row.

    Raises `YRunnerError` if the file of the schema cannot be read.
    """
    fixed = section.json_schema if section.file is None else read_json(section.file)

    def score(completion: Completion) -> float:
        text = read_answer(completion.text, section.tag)
        try:
            value = json.loads(text or "", parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return 0.0
        schema = completion.columns[section.schema_column] if fixed is None else fixed
        if isinstance(schema, str):
            schema = json.loads(schema)
        matches = _validator(json.dumps(schema)).is_valid(value)
        return 1.0 if matches else 0.5 * (section.grade == "parts")

    return score


def _refuse_constant(name: str) -> Any:
    # Python reads NaN and Infinity; other readers of JSON do not.
    raise ValueError(f"{name} is not JSON")


@lru_cache(maxsize=1024)
def _validator(schema: str) -> Validator:
    value = json.loads(schema)
    return validator_for(value, Draft202012Validator)(value)
