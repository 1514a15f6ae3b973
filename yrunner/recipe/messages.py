"""Turn each of Pydantic's errors into one sentence, by the recipe's JSON Schema.

For a discriminated union Pydantic inserts the variant into the path, `('tuning', 'lora', 'rnak')`;
for a plain union it reports the errors of every member. Walking the JSON Schema along the path
tells variants from keys, and says what a key accepts. Editors use the same schema.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from math import isfinite
from typing import Any

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails

from yrunner.recipe.other_tools import TOOLS, counterpart, tool_of
from yrunner.recipe.schema.recipe import Recipe
from yrunner.recipe.yaml_tree import (
    KeyPath,
    Node,
    RecipeFault,
    SourceLocation,
    find,
    read_plain_scalar,
    shown,
)

Schema = dict[str, Any]

# Numbers that YAML 1.1 parsers, such as `yaml.safe_load`, return as text: 1e-4.
_NUMBER_AS_TEXT = r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"


class _WithoutFieldTitles(GenerateJsonSchema):
    """Pydantic's schema without a title per field: editors would show "Max Lr" above max_lr."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@cache
def _strict_schema() -> Schema:
    """The schema of the values that `load.py` passes to Pydantic; do not modify the result."""
    schema = Recipe.model_json_schema(schema_generator=_WithoutFieldTitles)
    for union in [part for part in _parts(schema) if "discriminator" in part]:
        for reference in union["discriminator"]["mapping"].values():
            variant = schema["$defs"][reference.rsplit("/", 1)[1]]
            # Pydantic needs the kind to choose a variant, even if the kind has a default.
            variant["required"] = sorted({*variant.get("required", []), "kind"})
    return schema


def recipe_json_schema() -> Schema:
    """JSON Schema (draft 2020-12) of a recipe, for YAML language servers (`yrun schema`)."""
    schema = deepcopy(_strict_schema())
    for part in _parts(schema):
        part.pop("discriminator", None)  # OpenAPI's word, unknown to JSON Schema
        if part.get("type") == "number":
            part["type"] = ["number", "string"]
            part["pattern"] = _NUMBER_AS_TEXT
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "yrunner recipe",
    }


def _resolve(schema: Schema) -> Schema:
    """Follow references and drop "or null" until the schema itself describes the value."""
    while True:
        options = [option for option in schema.get("anyOf", []) if option.get("type") != "null"]
        if "$ref" in schema:
            target = _strict_schema()["$defs"][schema["$ref"].rsplit("/", 1)[1]]
        elif len(options) == 1:
            target = options[0]
        else:
            return schema
        beside = {key: value for key, value in schema.items() if key not in ("$ref", "anyOf")}
        schema = {**target, **beside}


def _variants(schema: Schema) -> dict[str, Schema]:
    """The members of a union discriminated by `kind`, by kind; empty for other schemas."""
    mapping = schema.get("discriminator", {}).get("mapping", {})
    return {kind: _resolve({"$ref": reference}) for kind, reference in mapping.items()}


def _parts(schema: Any) -> list[Schema]:
    """A schema and every schema inside it."""
    if isinstance(schema, list):
        return [part for item in schema for part in _parts(item)]
    if not isinstance(schema, dict):
        return []
    inner = [part for key, item in schema.items() if key != "default" for part in _parts(item)]
    return [schema, *inner]


_BOUNDS = {
    "minimum": "of at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "of at most {}",
    "exclusiveMaximum": "below {}",
}
_TYPES = {"boolean": "true or false", "integer": "a whole number", "number": "a number"}


def _expected(schema: Schema) -> str:
    """What the schema accepts, in words: "a number above 0 and below 1"."""
    schema = _resolve(schema)
    if kinds := _variants(schema):
        return f"a section with a kind ({', '.join(kinds)})"
    if "anyOf" in schema:
        options = [_expected(option) for option in schema["anyOf"] if option.get("type") != "null"]
        if "a number" in options and "a whole number" in options:
            options.remove("a whole number")
        return " or ".join(dict.fromkeys(options))
    if choices := _choices(schema):
        names = ", ".join(f'"{choice}"' for choice in choices)
        return names if len(choices) == 1 else f"one of {names}"
    match schema.get("type"):
        case "object":
            keys = ", ".join(schema.get("properties", {}))
            return f"a section with the keys {keys}" if keys else "a section of names and values"
        case "array":
            few = schema.get("minItems", 0)
            return f"a list of at least {few}" if few else "a list"
        case "string":
            return _expected_text(schema)
        case kind:
            bounds = [words.format(schema[key]) for key, words in _BOUNDS.items() if key in schema]
            return f"{_TYPES.get(str(kind), 'something else')} {' and '.join(bounds)}".rstrip()


def _expected_text(schema: Schema) -> str:
    if schema.get("format") == "path":
        return "a path"
    return "non-empty text" if schema.get("minLength") else "text"


def _choices(schema: Schema) -> list[str]:
    """The allowed words, if only certain words are allowed."""
    if "const" in schema:
        return [schema["const"]]
    return [str(choice) for choice in schema.get("enum", [])]


def _all_choices(schema: Schema) -> list[str]:
    """The allowed words of a schema and of its alternatives."""
    schema = _resolve(schema)
    options = [schema, *map(_resolve, schema.get("anyOf", []))]
    return [choice for option in options for choice in _choices(option)]


def _given(node: Node) -> str:
    """The value as the user wrote it."""
    match node.content:
        case None:
            return "nothing"
        case dict():
            return "a section"
        case list():
            return "a list" if node.content else "an empty list"
        case str():
            return f'"{shown(node.content)}"'
        case bool():
            return f"{shown(node.text)} (which YAML reads as {str(node.content).lower()})"
        case _:
            return shown(node.text)


def _remedy(schema: Schema, node: Node) -> str:
    """How to fix the value, if that is clear; begins with a comma or semicolon."""
    schema = _resolve(schema)
    types = {_resolve(option).get("type") for option in schema.get("anyOf", [schema])}
    match node.content:
        case str():
            return _remedy_for_text(schema, types, node.content)
        case bool() | int() | float():
            return _remedy_for_number(schema, types, node)
        case dict() if "array" in types:
            return '; begin each item with "- "'
        case _:
            return ""


def _remedy_for_text(schema: Schema, types: set[str | None], text: str) -> str:
    if hint := did_you_mean(text, _all_choices(schema)):
        return hint
    bare = read_plain_scalar(text)
    fits = {bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}}
    if types & fits.get(type(bare), set()):
        return "; remove the quotes"
    if "array" in types:
        return f"; for a list of one write [{shown(text)}]"
    required = schema.get("required", [])
    if types == {"object"} and len(required) == 1:
        return f"; write {{{required[0]}: {shown(text)}}}"
    return ""


def _remedy_for_number(schema: Schema, types: set[str | None], node: Node) -> str:
    content = node.content
    if "string" in types and not _all_choices(schema):
        return f'; to make it text, put it in quotes: "{shown(node.text)}"'
    if isinstance(content, float) and not isfinite(content):
        return "; it must be finite"
    if isinstance(content, float) and types == {"integer"} and content.is_integer():
        return f"; write {int(content)}" if abs(content) < 1e15 else ""
    return ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean "rank"?`, or an empty text if no known word is close."""
    folded = {choice.lower(): choice for choice in known}
    # difflib is slow on long text, and no key is longer than this.
    near = get_close_matches(word[:60].lower().replace("-", "_"), folded, n=1, cutoff=0.6)
    return f', did you mean "{folded[near[0]]}"?' if near else ""


@dataclass(frozen=True)
class _Spot:
    """Where an error belongs: the path in the file, and the schema there.

    `union` is the path of a plain union on the way, `member` Pydantic's name for the union member
    that reported the error.
    """

    path: KeyPath
    schema: Schema
    union: KeyPath | None = None
    member: str = ""


def explain_errors(errors: Sequence[ErrorDetails], root: Node) -> list[RecipeFault]:
    """One fault per problem; a single one for a whole recipe of another tool."""
    if foreign := _foreign_recipe(root):
        return [foreign]
    spots = [(error, _locate(error["loc"])) for error in errors]
    faults = [_explain(error, spot, root) for error, spot in spots if spot.union is None]
    for union in dict.fromkeys(spot.union for _, spot in spots if spot.union is not None):
        group = [(error, spot) for error, spot in spots if spot.union == union]
        faults.extend(_explain_union(union, group, root))
    return faults


def _foreign_recipe(root: Node) -> RecipeFault | None:
    """What to say of another tool's recipe, which would have a fault for every key."""
    keys = root.content if isinstance(root.content, dict) else {}
    tool = tool_of(keys)
    ours = [key for key in ("model", "tuning", "data", "train") if key in keys]
    if tool is None or any(isinstance(keys[key].content, dict) for key in ours):
        return None
    places = [f"{key}: {place}" for key in keys if (place := TOOLS[tool].get(key))]
    message = (
        f"this is a recipe of {tool}, not of yrunner; `yrun init` writes recipes to start from; "
        f"its keys are here: {', '.join(places)}"
    )
    return RecipeFault(root.location, (), message)


def _locate(loc: Sequence[str | int]) -> _Spot:
    """Walk the schema along the `loc` of a Pydantic error."""
    schema = _strict_schema()
    path: KeyPath = ()
    union: KeyPath | None = None
    member = ""
    for part in loc:
        schema = _resolve(schema)
        if kinds := _variants(schema):
            schema = kinds.get(str(part), {})
        elif "anyOf" in schema:
            union, member = path, str(part)
            schema = _union_member(schema, member)
        else:
            path = (*path, part)
            schema = _child(schema, part)
    return _Spot(path, _resolve(schema), union, member)


def _union_member(schema: Schema, label: str) -> Schema:
    """The member that Pydantic calls `label`: a class name, list[str] or dict[str,int]."""
    for option in schema["anyOf"]:
        if option.get("$ref", "/").rsplit("/", 1)[1] in re.findall(r"\w+", label):
            return _resolve(option)
        if label.startswith({"array": "list[", "object": "dict["}.get(option.get("type"), "?")):
            return _resolve(option)
    return {}


def _child(schema: Schema, part: str | int) -> Schema:
    if isinstance(part, int):
        found = schema.get("items")
    else:
        found = schema.get("properties", {}).get(part, schema.get("additionalProperties"))
    return found if isinstance(found, dict) else {}


def _explain_union(
    union: KeyPath, group: list[tuple[ErrorDetails, _Spot]], root: Node
) -> Iterator[RecipeFault]:
    """Errors inside the value are the most precise; without any, list what the union accepts."""
    inside: dict[str, list[tuple[ErrorDetails, _Spot]]] = {}
    for error, spot in group:
        if len(spot.path) > len(union):
            inside.setdefault(spot.member, []).append((error, spot))
    if inside:
        for error, spot in min(inside.values(), key=len):
            yield _explain(error, spot, root)
    else:
        yield _explain_value(_Spot(union, _schema_at(union, root)), root)


def _schema_at(path: KeyPath, root: Node) -> Schema:
    """The schema at a path of the file; each `kind` in the file selects its variant."""
    schema = _strict_schema()
    for depth, part in enumerate(path):
        schema = _resolve(schema)
        if kinds := _variants(schema):
            kind, _ = find(root, (*path[:depth], "kind"))
            schema = kinds.get(str(kind.content), {})
        schema = _child(schema, part)
    return _resolve(schema)


def _explain(error: ErrorDetails, spot: _Spot, root: Node) -> RecipeFault:
    sentences: dict[str, Callable[[], RecipeFault]] = {
        "extra_forbidden": lambda: _explain_unknown_key(error["loc"], spot, root),
        "missing": lambda: _explain_missing_key(spot.path, spot.schema, root),
        "union_tag_not_found": lambda: _explain_kind(spot, root),
        "union_tag_invalid": lambda: _explain_kind(spot, root),
        "value_error": lambda: _explain_refusal(error, spot, root),
        "string_pattern_mismatch": lambda: _explain_pattern(spot, root),
    }
    return sentences.get(error["type"], lambda: _explain_value(spot, root))()


def _explain_unknown_key(loc: Sequence[str | int], spot: _Spot, root: Node) -> RecipeFault:
    key = str(spot.path[-1])
    section = _locate(loc[:-1]).schema
    union = _locate(loc[:-2]).schema if len(loc) > 1 else {}
    owners = [kind for kind, variant in _variants(union).items() if key in variant["properties"]]
    node, _ = find(root, spot.path)
    location = _key_location(node)
    if owners:
        have = f"kind {owners[0]} has" if len(owners) == 1 else f"kinds {' and '.join(owners)} have"
        message = f"only {have} this key, not {loc[-2]}; remove it"
        message += _whole_section_hint(spot.path[:-1], location, root)
    else:
        foreign = counterpart(key)
        message = f"unknown key; {foreign}" if foreign else f"unknown key{_meant_key(key, section)}"
    return RecipeFault(location, spot.path, message)


def _whole_section_hint(section: KeyPath, location: SourceLocation, root: Node) -> str:
    kind, _ = find(root, (*section, "kind"))
    if kind.location.turn <= location.turn:
        return ""
    name = ".".join(map(str, section))
    return f', or override the whole section: "{name}={{kind: {kind.content}}}"'


def _meant_key(key: str, section: Schema) -> str:
    known = section.get("properties", {})
    elsewhere = {".".join(path) for path in _key_paths(_strict_schema()) if path[-1] == key}
    # A slip of one letter is likelier than the key of another section.
    if len(elsewhere) == 1 and not get_close_matches(key[:60], known, n=1, cutoff=0.9):
        return f' here, did you mean "{elsewhere.pop()}"?'
    return did_you_mean(key, known) or f"; valid keys are {', '.join(known)}"


def _key_paths(schema: Schema) -> Iterator[tuple[str, ...]]:
    """The path of every key of the recipe outside lists."""
    schema = _resolve(schema)
    for section in _variants(schema).values() or [schema]:
        for key, child in section.get("properties", {}).items():
            yield (key,)
            for path in _key_paths(child):
                yield (key, *path)


def _explain_missing_key(path: KeyPath, schema: Schema, root: Node) -> RecipeFault:
    parent, _ = find(root, path[:-1])
    return RecipeFault(
        _key_location(parent), path, f"this key is missing; it must be {_expected(schema)}"
    )


def _explain_kind(spot: _Spot, root: Node) -> RecipeFault:
    path = (*spot.path, str(spot.schema["discriminator"]["propertyName"]))
    choices = {"enum": list(_variants(spot.schema))}
    if find(root, path)[1]:
        return _explain_value(_Spot(path, choices), root)
    return _explain_missing_key(path, choices, root)


def _explain_value(spot: _Spot, root: Node) -> RecipeFault:
    node, _ = find(root, spot.path)
    message = f"must be {_expected(spot.schema)}, got {_given(node)}{_remedy(spot.schema, node)}"
    return RecipeFault(_value_location(node), spot.path, message)


def _explain_pattern(spot: _Spot, root: Node) -> RecipeFault:
    node, _ = find(root, spot.path)
    meaning = str(spot.schema.get("description", f"text like {spot.schema['pattern']}"))
    meaning = " ".join(meaning.split()).rstrip(".")
    message = f"{_given(node)} is not valid; expected: {meaning[0].lower()}{meaning[1:]}"
    return RecipeFault(_value_location(node), spot.path, message)


def _explain_refusal(error: ErrorDetails, spot: _Spot, root: Node) -> RecipeFault:
    """The message of one of the schema's validators, at the key it mentions."""
    message = shown(error["msg"].removeprefix("Value error, "), limit=600)
    node, _ = find(root, spot.path)
    if not isinstance(node.content, dict):
        return RecipeFault(_value_location(node), spot.path, message)
    # A validator of a section names the keys that conflict: point at the first one set by an
    # override, else at the first one, else at the section.
    words = [
        tuple(int(part) if part.isdecimal() else part for part in word.split("."))
        for word in re.findall(r"[\w.]*\w", message)
    ]
    named = [found for found, whole in (find(node, word) for word in words) if whole]
    from_overrides = [key for key in named if _key_location(key).turn]
    culprit = (from_overrides or named or [node])[0]
    return RecipeFault(_key_location(culprit), spot.path, message)


def _key_location(node: Node) -> SourceLocation:
    return node.key_location or node.location


def _value_location(node: Node) -> SourceLocation:
    """The location of the value, or of the key if its value is empty."""
    return _key_location(node) if node.content is None and not node.text else node.location
