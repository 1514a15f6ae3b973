"""Turn Pydantic's errors into one sentence each, at the line that the user must change.

For a union Pydantic puts the name of the variant into the path, `('tuning', 'lora', 'rnak')`, and
for a plain union it reports every member's complaint. Walking the schema beside the path tells
the variants from the keys.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pydantic_core import ErrorDetails

from yrunner.recipe.document import Fault, KeyPath, Node, Place, find, shown
from yrunner.recipe.json_schema import Schema, resolve, strict_schema, variants
from yrunner.recipe.wording import did_you_mean, given, remedy, wanted


@dataclass(frozen=True)
class _Spot:
    """Where an error belongs: the path as the file has it, and what is wanted there.

    `union` is the path of the plain union on the way there, `member` Pydantic's name for the
    member that complains.
    """

    path: KeyPath
    schema: Schema
    union: KeyPath | None = None
    member: str = ""


def explain_errors(errors: Sequence[ErrorDetails], root: Node) -> list[Fault]:
    """One fault for each thing that is wrong."""
    spots = [(error, _locate(error["loc"])) for error in errors]
    faults = [_explain(error, spot, root) for error, spot in spots if spot.union is None]
    for union in dict.fromkeys(spot.union for _, spot in spots if spot.union is not None):
        group = [(error, spot) for error, spot in spots if spot.union == union]
        faults.extend(_explain_union(union, group, root))
    return faults


def _locate(location: Sequence[str | int]) -> _Spot:
    schema = strict_schema()
    path: KeyPath = ()
    union: KeyPath | None = None
    member = ""
    for part in location:
        schema = resolve(schema)
        if kinds := variants(schema):
            schema = kinds.get(str(part), {})
        elif "anyOf" in schema:
            union, member = path, str(part)
            schema = _union_member(schema, member)
        else:
            path = (*path, part)
            schema = _child(schema, part)
    return _Spot(path, resolve(schema), union, member)


def _union_member(schema: Schema, label: str) -> Schema:
    """The member that Pydantic calls `label`: a class's name or list[str], dict[str,int]."""
    for option in schema["anyOf"]:
        if option.get("$ref", "/").rsplit("/", 1)[1] in re.findall(r"\w+", label):
            return resolve(option)
        if label.startswith({"array": "list[", "object": "dict["}.get(option.get("type"), "?")):
            return resolve(option)
    return {}


def _child(schema: Schema, part: str | int) -> Schema:
    if isinstance(part, int):
        found = schema.get("items")
    else:
        found = schema.get("properties", {}).get(part, schema.get("additionalProperties"))
    return found if isinstance(found, dict) else {}


def _explain_union(
    union: KeyPath, group: list[tuple[ErrorDetails, _Spot]], root: Node
) -> Iterator[Fault]:
    """A member that looked inside the value knows best what is wrong there; else ask for either."""
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
    """What is wanted at a path of the file, whose own kinds say which variant applies."""
    schema = strict_schema()
    for depth, part in enumerate(path):
        schema = resolve(schema)
        if kinds := variants(schema):
            kind, _ = find(root, (*path[:depth], "kind"))
            schema = kinds.get(str(kind.content), {})
        schema = _child(schema, part)
    return resolve(schema)


def _explain(error: ErrorDetails, spot: _Spot, root: Node) -> Fault:
    sentences: dict[str, Callable[[], Fault]] = {
        "extra_forbidden": lambda: _explain_unknown_key(error["loc"], spot, root),
        "missing": lambda: _explain_missing_key(spot.path, spot.schema, root),
        "union_tag_not_found": lambda: _explain_kind(spot, root),
        "union_tag_invalid": lambda: _explain_kind(spot, root),
        "value_error": lambda: _explain_refusal(error, spot, root),
        "string_pattern_mismatch": lambda: _explain_pattern(spot, root),
    }
    return sentences.get(error["type"], lambda: _explain_value(spot, root))()


def _explain_unknown_key(location: Sequence[str | int], spot: _Spot, root: Node) -> Fault:
    key = str(spot.path[-1])
    section = _locate(location[:-1]).schema
    union = _locate(location[:-2]).schema if len(location) > 1 else {}
    owners = [kind for kind, variant in variants(union).items() if key in variant["properties"]]
    node, _ = find(root, spot.path)
    place = _key_place(node)
    if owners:
        have = f"kind {owners[0]} has" if len(owners) == 1 else f"kinds {' and '.join(owners)} have"
        message = f"only {have} this key, not {location[-2]}; remove it"
        message += _whole_section_hint(spot.path[:-1], place, root)
    else:
        message = f"unknown key{_meant_key(key, section)}"
    return Fault(place, spot.path, message)


def _whole_section_hint(section: KeyPath, place: Place, root: Node) -> str:
    kind, _ = find(root, (*section, "kind"))
    if kind.place.turn <= place.turn:
        return ""
    name = ".".join(map(str, section))
    return f', or override the whole section: "{name}={{kind: {kind.content}}}"'


def _meant_key(key: str, section: Schema) -> str:
    elsewhere = {".".join(path) for path in _key_paths(strict_schema()) if path[-1] == key}
    if len(elsewhere) == 1:
        return f' here, did you mean "{elsewhere.pop()}"?'
    known = section.get("properties", {})
    return did_you_mean(key, known) or f"; the keys here are {', '.join(known)}"


def _key_paths(schema: Schema) -> Iterator[tuple[str, ...]]:
    """Every key of the recipe outside lists, as a path."""
    schema = resolve(schema)
    for section in variants(schema).values() or [schema]:
        for key, child in section.get("properties", {}).items():
            yield (key,)
            for path in _key_paths(child):
                yield (key, *path)


def _explain_missing_key(path: KeyPath, schema: Schema, root: Node) -> Fault:
    parent, _ = find(root, path[:-1])
    return Fault(_key_place(parent), path, f"this key is missing; it must be {wanted(schema)}")


def _explain_kind(spot: _Spot, root: Node) -> Fault:
    path = (*spot.path, str(spot.schema["discriminator"]["propertyName"]))
    choices = {"enum": list(variants(spot.schema))}
    if find(root, path)[1]:
        return _explain_value(_Spot(path, choices), root)
    return _explain_missing_key(path, choices, root)


def _explain_value(spot: _Spot, root: Node) -> Fault:
    node, _ = find(root, spot.path)
    message = f"must be {wanted(spot.schema)}, got {given(node)}{remedy(spot.schema, node)}"
    return Fault(_value_place(node), spot.path, message)


def _explain_pattern(spot: _Spot, root: Node) -> Fault:
    node, _ = find(root, spot.path)
    meaning = str(spot.schema.get("description", f"text like {spot.schema['pattern']}"))
    meaning = " ".join(meaning.split()).rstrip(".")
    message = f"{given(node)} cannot be used; wanted: {meaning[0].lower()}{meaning[1:]}"
    return Fault(_value_place(node), spot.path, message)


def _explain_refusal(error: ErrorDetails, spot: _Spot, root: Node) -> Fault:
    """What one of the schema's own validators says, at the key that it speaks of."""
    message = shown(error["msg"].removeprefix("Value error, "), limit=600)
    node, _ = find(root, spot.path)
    if not isinstance(node.content, dict):
        return Fault(_value_place(node), spot.path, message)
    # A validator of a section names the keys that do not go together: show the first of them
    # that an override brought in, otherwise the first at all, otherwise the section.
    words = [tuple(word.split(".")) for word in re.findall(r"[\w.]*\w", message)]
    named = [found for found, whole in (find(node, word) for word in words) if whole]
    from_overrides = [key for key in named if _key_place(key).turn]
    culprit = (from_overrides or named or [node])[0]
    return Fault(_key_place(culprit), spot.path, message)


def _key_place(node: Node) -> Place:
    return node.key_place or node.place


def _value_place(node: Node) -> Place:
    """The value, or, where nothing is written behind the key, the key."""
    return _key_place(node) if node.content is None and not node.text else node.place
