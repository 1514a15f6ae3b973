"""Read YAML into values that know where they were written.

`yaml.safe_load` forgets the lines, keeps the last of two equal keys, expands alias bombs, and
reads 1e-4 as text. So a tree is built here from PyYAML's events; `plain_words.py` reads its words.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import yaml

from yrunner.recipe.plain_words import Scalar, read_plain_scalar
from yrunner.recipe.yaml_faults import explain_syntax_error, find_control_character

KeyPath = tuple[str | int, ...]

MAX_VALUES = 5_000
MAX_DEPTH = 30


@dataclass(frozen=True, order=True)
class Place:
    """A line and column of the recipe, both from 1, or, with line 0, a whole override.

    `turn` orders the sources: 0 for the file, then the overrides as they were given.
    """

    turn: int
    line: int
    column: int
    source: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True)
class Fault:
    """Something wrong at a place; `path` names the key, as far as there is one."""

    place: Place
    path: KeyPath
    message: str


@dataclass(frozen=True)
class Node:
    """A value, where it was written and how; under a key also where the key was written.

    `size` and `depth` count what it holds after its aliases are written out.
    """

    content: "Scalar | list[Node] | dict[str, Node]"
    place: Place
    text: str = ""
    key_place: Place | None = None
    size: int = 1
    depth: int = 1


class Unreadable(Exception):
    """The text is no recipe at all, so there is nothing to look for further faults in."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


def read_document(text: str, start: Place) -> tuple[Node, list[Fault]]:
    """The tree of a YAML text, and the faults that did not keep it from being read.

    With `start.line` 0 the text is an override, which is one place as a whole.
    """
    if forbidden := find_control_character(text):
        line, column, message = forbidden
        raise Unreadable(Fault(_place(start, line, column), (), message))
    composer = _Composer(text, start)
    try:
        return composer.document(), composer.faults
    except yaml.MarkedYAMLError as error:
        line, column, message = explain_syntax_error(error, text)
        raise Unreadable(Fault(_place(start, line, column), (), message)) from error
    finally:
        composer.close()


def plain(node: Node) -> Any:
    """The bare value, as JSON would hold it."""
    match node.content:
        case dict():
            return {key: plain(child) for key, child in node.content.items()}
        case list():
            return [plain(child) for child in node.content]
        case _:
            return node.content


def find(node: Node, path: KeyPath) -> tuple[Node, bool]:
    """The node at a path, or the deepest one on the way there; and whether it is the whole way."""
    for part in path:
        content = node.content
        if isinstance(content, dict) and part in content:
            node = content[str(part)]
        elif isinstance(content, list) and isinstance(part, int) and part < len(content):
            node = content[part]
        else:
            return node, False
    return node, True


def shown(text: str, limit: int = 60) -> str:
    """Text of a recipe as it may stand in a message: one line, short, nothing unprintable."""
    line = "".join(sign if sign.isprintable() else "?" for sign in " ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."


_TOO_DEEP = f"nested more than {MAX_DEPTH} deep, no recipe needs that; remove the excess"
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # PyYAML's parser in Python lets "\\ud800" pass
_NOT_TEXT = "this text holds half a character (\\ud800 to \\udfff); remove that escape"
_TOO_MANY = (
    f"more than {MAX_VALUES:,} values, counting what each alias (*name) stands for; cut it down"
)


def _loader_class() -> Any:
    """The parser in C where PyYAML has it: ten times faster, with the same events."""
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Composer:
    """Builds the tree, event by event, so that a bomb is refused before it is expanded."""

    def __init__(self, text: str, start: Place) -> None:
        self.start = start
        self.loader = _loader_class()(text)
        self.faults: list[Fault] = []
        self.num_values = 0
        self.anchors: dict[str, Node | None] = {}  # None while the node is still being read

    def close(self) -> None:
        self.loader.dispose()

    def place_of(self, event: Any) -> Place:
        return _place(self.start, event.start_mark.line, event.start_mark.column)

    def document(self) -> Node:
        self.loader.get_event()  # the stream starts
        if self.loader.check_event(yaml.StreamEndEvent):
            return Node(None, self.start)
        self.loader.get_event()  # the document starts
        node = self.node(())
        self.loader.get_event()  # the document ends
        if not self.loader.check_event(yaml.StreamEndEvent):
            message = 'a second document begins here; a recipe is one, remove the "---"'
            self.faults.append(Fault(self.place_of(self.loader.peek_event()), (), message))
        return node

    def node(self, path: KeyPath) -> Node:
        event = self.loader.get_event()
        place = self.place_of(event)
        if len(path) >= MAX_DEPTH:
            raise Unreadable(Fault(place, (), _TOO_DEEP))
        if isinstance(event, yaml.AliasEvent):
            node = self.aliased(str(event.anchor), place, path)
            self.count(node.size, place)
        else:
            self.count(1, place)
            if event.anchor:
                self.anchors[event.anchor] = None
            node = self.written(event, place, path)
            if event.anchor:
                self.anchors[event.anchor] = node
        if len(path) + node.depth > MAX_DEPTH:
            raise Unreadable(Fault(place, (), _TOO_DEEP))
        return node

    def count(self, values: int, place: Place) -> None:
        self.num_values += values
        if self.num_values > MAX_VALUES:
            raise Unreadable(Fault(place, (), _TOO_MANY))

    def aliased(self, anchor: str, place: Place, path: KeyPath) -> Node:
        if anchor not in self.anchors:
            message = (
                f'the alias *{shown(anchor)} stands for nothing; write "&{shown(anchor)}" before '
                "the value that it repeats, or put the text in quotes"
            )
        elif (node := self.anchors[anchor]) is not None:
            return replace(node, place=place)
        else:
            message = f"the alias *{shown(anchor)} stands inside the value that it repeats"
            message += "; remove it"
        raise Unreadable(Fault(place, path, message))

    def written(self, event: Any, place: Place, path: KeyPath) -> Node:
        # "!" alone and !!str say only that the value is text, which a recipe can hold.
        if event.tag not in (None, "!", "tag:yaml.org,2002:str"):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            message = f"the tag {shown(tag)} is not allowed, a recipe holds plain values; remove it"
            self.faults.append(Fault(place, path, message))
        match event:
            case yaml.ScalarEvent():
                plain_word = event.implicit[0] and event.tag is None
                content = read_plain_scalar(event.value) if plain_word else event.value
                if _HALF_CHARACTER.search(event.value):
                    raise Unreadable(Fault(place, path, _NOT_TEXT))
                return Node(content, place, event.value)
            case yaml.SequenceStartEvent():
                return _holding(list(self.items(path)), place)
            case _:
                return _holding(self.mapping(path), place)

    def items(self, path: KeyPath) -> Iterator[Node]:
        index = 0
        while not self.loader.check_event(yaml.SequenceEndEvent):
            yield self.node((*path, index))
            index += 1
        self.loader.get_event()

    def mapping(self, path: KeyPath) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        while not self.loader.check_event(yaml.MappingEndEvent):
            is_merge = _is_merge_key(self.loader.peek_event())
            key = self.node((*path, "?"))  # a key may itself be nested, until it is refused
            if is_merge:
                self.merge(self.node(path), merged, path)
            elif self.key_is_fit(key, own, path):
                value = self.node((*path, str(key.content)))
                own[str(key.content)] = replace(value, key_place=key.place)
            else:
                self.node((*path, "?"))
        self.loader.get_event()
        return {**merged, **own}

    def key_is_fit(self, key: Node, own: dict[str, Node], path: KeyPath) -> bool:
        if not isinstance(key.content, str):
            word = shown(key.text)
            message = "a key must be text, and this is none; write a name"
            if word:
                message = f'the key {word} is not text; put it in quotes: "{word}"'
            self.faults.append(Fault(key.place, path, message))
            return False
        if key.content in own:
            first = own[key.content].key_place
            where = f", first in line {first.line}" if first and first.line else ""
            message = f"this key is given twice{where}; remove one of them"
            self.faults.append(Fault(key.place, (*path, key.content), message))
            return False
        return True

    def merge(self, source: Node, merged: dict[str, Node], path: KeyPath) -> None:
        """Take over the keys of `<<: *name`; the section's own keys and earlier merges win."""
        sources = source.content if isinstance(source.content, list) else [source]
        for section in sources:
            if isinstance(section.content, dict):
                for key, value in section.content.items():
                    merged.setdefault(key, value)
            else:
                message = 'only a section can be merged with "<<"; write "<<: *name"'
                self.faults.append(Fault(source.place, path, message))


def _place(start: Place, line: int, column: int) -> Place:
    """The place of PyYAML's line and column, which count from 0."""
    return replace(start, line=line + 1, column=column + 1) if start.line else start


def _is_merge_key(event: Any) -> bool:
    return isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]


def _holding(content: list[Node] | dict[str, Node], place: Place) -> Node:
    children = list(content.values()) if isinstance(content, dict) else content
    return Node(
        content,
        place,
        size=1 + sum(child.size for child in children),
        depth=1 + max((child.depth for child in children), default=0),
    )
