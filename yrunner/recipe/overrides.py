"""`train.learning_rate=1e-5`: changes of a recipe that are given on the command line."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from yrunner.recipe.document import (
    MAX_DEPTH,
    Fault,
    KeyPath,
    Node,
    Place,
    Unreadable,
    read_document,
    shown,
)


@dataclass(frozen=True)
class Override:
    """One change: the value that is put at a path. In the path, digits number list items."""

    path: tuple[str, ...]
    value: Node


class NoPlace(Exception):
    """The recipe has no room for an override; the message says why."""


def split_page(texts: Sequence[str], wanted: bool) -> tuple[list[str], Path | None]:
    """The overrides, and the file of a page among them, where one is wanted: it has no `=`."""
    page = next((text for text in texts if wanted and "=" not in text), None)
    changes = [text for text in texts if text is not page]
    return changes, None if page is None else Path(page)


def parse_overrides(texts: Sequence[str]) -> tuple[list[Override], list[Fault]]:
    """The overrides that can be read, and the faults of the others."""
    overrides: list[Override] = []
    faults: list[Fault] = []
    for turn, text in enumerate(texts, start=1):
        place = Place(turn, 0, 0, f"override {shown(text)}")
        key, equals, value_text = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path) or len(path) > MAX_DEPTH:
            message = "not an override; write key=value, for example train.learning_rate=1e-5"
            faults.append(Fault(place, (), message))
            continue
        try:
            value, value_faults = read_document(value_text, place)
        except Unreadable as error:
            faults.append(error.fault)
            continue
        overrides.append(Override(path, replace(value, key_place=place)))
        faults.extend(replace(fault, path=(*path, *fault.path)) for fault in value_faults)
    return overrides, faults


def apply_overrides(root: Node, overrides: Sequence[Override]) -> tuple[Node, list[Fault]]:
    """The recipe with each override in turn; one that fits nowhere becomes a fault."""
    faults = []
    for override in overrides:
        try:
            root = _put(root, override.path, override.value, ())
        except NoPlace as error:
            faults.append(Fault(override.value.place, override.path, str(error)))
    return root, faults


def _put(node: Node, path: tuple[str, ...], value: Node, above: KeyPath) -> Node:
    """A copy of `node` with `value` at `path`; sections and lists on the way are made if missing.

    Copies, because an alias lets one node stand at several places of the recipe.
    """
    if not path:
        return replace(value, key_place=value.place)
    part, rest = path[0], path[1:]
    content = node.content
    if content is None:
        content = [] if part == "0" else {}
    missing = Node(None, value.place, key_place=value.place)
    if isinstance(content, dict):
        child = _put(content.get(part, missing), rest, value, (*above, part))
        return replace(node, content={**content, part: child})
    if isinstance(content, list):
        index = _list_index(part, len(content), above)
        child = _put(content[index] if index < len(content) else missing, rest, value, above)
        return replace(node, content=[*content[:index], child, *content[index + 1 :]])
    owner = ".".join(str(key) for key in above)
    raise NoPlace(f'"{owner}" is a single value and has no "{part}"; set "{owner}" as a whole')


def _list_index(part: str, length: int, above: KeyPath) -> int:
    owner = ".".join(str(key) for key in above)
    if not (part.isascii() and part.isdigit() and len(part) < 6 and int(part) <= length):
        raise NoPlace(
            f'"{owner}" is a list of {length}; number its items from 0, '
            f"{owner}.{length} adds one at its end"
        )
    return int(part)
