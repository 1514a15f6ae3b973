"""Say what a key may hold, what it was given, and what was probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches
from math import isfinite
from typing import Any

from yrunner.recipe.document import Node, shown
from yrunner.recipe.json_schema import Schema, resolve, variants
from yrunner.recipe.plain_words import read_plain_scalar

_BOUNDS = {
    "minimum": "of at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "of at most {}",
    "exclusiveMaximum": "below {}",
}
_TYPES = {"boolean": "true or false", "integer": "a whole number", "number": "a number"}


def wanted(schema: Schema) -> str:
    """What a value must be, from its schema: "a number above 0 and below 1"."""
    schema = resolve(schema)
    if kinds := variants(schema):
        return f"a section with a kind ({', '.join(kinds)})"
    if "anyOf" in schema:
        # Listing true, false and "nothing" behind "text" would help nobody.
        options = [wanted(option) for option in schema["anyOf"] if option.get("type") != "null"]
        if "a number" in options and "a whole number" in options:
            options.remove("a whole number")
        return " or ".join(dict.fromkeys(options))
    if choices := choices_of(schema):
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
            return _wanted_text(schema)
        case kind:
            bounds = [words.format(schema[key]) for key, words in _BOUNDS.items() if key in schema]
            return f"{_TYPES.get(str(kind), 'something else')} {' and '.join(bounds)}".rstrip()


def _wanted_text(schema: Schema) -> str:
    if schema.get("format") == "path":
        return "a path"
    return "text that is not empty" if schema.get("minLength") else "text"


def choices_of(schema: Schema) -> list[str]:
    """The words that may stand here, if only certain words may."""
    if "const" in schema:
        return [schema["const"]]
    return [str(choice) for choice in schema.get("enum", [])]


def all_choices(schema: Schema) -> list[str]:
    """The words that may stand here among other things."""
    schema = resolve(schema)
    options = [schema, *map(resolve, schema.get("anyOf", []))]
    return [choice for option in options for choice in choices_of(option)]


def given(node: Node) -> str:
    """What stands there, as the user wrote it."""
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


def remedy(schema: Schema, node: Node) -> str:
    """What would make the value fit, where that is clear; begins with a comma or semicolon."""
    schema = resolve(schema)
    types = {resolve(option).get("type") for option in schema.get("anyOf", [schema])}
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
    if meant := closest(text, all_choices(schema)):
        return f', did you mean "{meant}"?'
    bare = read_plain_scalar(text)
    fits = {bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}}
    if types & fits.get(type(bare), set()):
        return "; remove the quotes"
    if "array" in types:
        return f"; a list of one is written [{shown(text)}]"
    required = schema.get("required", [])
    if types == {"object"} and len(required) == 1:
        return f"; write {{{required[0]}: {shown(text)}}}"
    return ""


def _remedy_for_number(schema: Schema, types: set[str | None], node: Node) -> str:
    content = node.content
    if "string" in types and not all_choices(schema):
        return f'; to make it text, put it in quotes: "{shown(node.text)}"'
    if isinstance(content, float) and not isfinite(content):
        return "; it must be finite"
    if isinstance(content, float) and types == {"integer"} and content.is_integer():
        return f"; write {int(content)}" if abs(content) < 1e15 else ""
    return ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean "rank"?`, or nothing when no known word is near."""
    meant = closest(word, known)
    return f', did you mean "{meant}"?' if meant else ""


def closest(word: Any, known: Iterable[str]) -> str:
    """The known word that is nearest to a misspelt one, or an empty text."""
    # Nobody misspells a name into a novel, and difflib is slow on long text.
    words = list(known)
    folded = {choice.lower(): choice for choice in words}
    near = get_close_matches(str(word)[:60].lower().replace("-", "_"), folded, n=1, cutoff=0.6)
    return folded[near[0]] if near else ""
