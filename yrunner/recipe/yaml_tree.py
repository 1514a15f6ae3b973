"""Parse YAML into a tree whose nodes know their line and column, with faults in plain words.

`yaml.safe_load` drops line numbers, keeps the last of two equal keys, expands alias bombs and
reads 1e-4 as text; its errors name parser states ("did not find expected key"). So the tree is
built here from PyYAML's events, unquoted scalars are resolved here, and errors are explained here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import yaml

Scalar = str | int | float | bool | None
KeyPath = tuple[str | int, ...]


MAX_VALUES = 5_000
MAX_DEPTH = 30


@dataclass(frozen=True, order=True)
class SourceLocation:
    """A line and column of the recipe, both from 1; line 0 means a whole override.

    `turn` orders the sources: 0 for the file, then 1, 2, ... for the overrides.
    """

    turn: int
    line: int
    column: int
    source: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True)
class RecipeFault:
    """A problem and its location; `path` is the key, if there is one."""

    location: SourceLocation
    path: KeyPath
    message: str


@dataclass(frozen=True)
class Node:
    """A value, its location and its source text; below a key, also the location of the key.

    `size` and `depth` count its contents with every alias expanded.
    """

    content: "Scalar | list[Node] | dict[str, Node]"
    location: SourceLocation
    text: str = ""
    key_location: SourceLocation | None = None
    size: int = 1
    depth: int = 1


class Unreadable(Exception):
    """The text is not a recipe, so it cannot be checked further."""

    def __init__(self, fault: RecipeFault) -> None:
        super().__init__(fault.message)
        self.fault = fault


def read_document(text: str, start: SourceLocation) -> tuple[Node, list[RecipeFault]]:
    """The tree of a YAML text, and the faults that did not prevent parsing.

    If `start.line` is 0, the text is an override, and every node gets the location `start`.
    """
    if forbidden := _find_control_character(text):
        line, column, message = forbidden
        raise Unreadable(RecipeFault(_location(start, line, column), (), message))
    composer = _Composer(text, start)
    try:
        return composer.document(), composer.faults
    except yaml.MarkedYAMLError as error:
        line, column, message = _explain_syntax_error(error, text)
        raise Unreadable(RecipeFault(_location(start, line, column), (), message)) from error
    finally:
        composer.loader.dispose()


def plain(node: Node) -> Any:
    """The value as plain JSON types."""
    match node.content:
        case dict():
            return {key: plain(child) for key, child in node.content.items()}
        case list():
            return [plain(child) for child in node.content]
        case _:
            return node.content


def find(node: Node, path: KeyPath) -> tuple[Node, bool]:
    """The node at a path, or the deepest one on the way; and whether the whole path exists."""
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
    """Recipe text for a message: one short line, printable characters only."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."


_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep; flatten it"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # PyYAML's parser in Python lets "\\ud800" pass
_SURROGATE_FAULT = "this text contains a lone surrogate (\\ud800 to \\udfff); remove that escape"
_TOO_MANY = f"more than {MAX_VALUES:,} values, with every alias (*name) expanded; shorten it"


def _loader_class() -> Any:
    """PyYAML's C parser where it is available: the same events, ten times faster."""
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Composer:
    """Builds the tree event by event, so that an alias bomb is refused before it expands."""

    def __init__(self, text: str, start: SourceLocation) -> None:
        self.start = start
        self.loader = _loader_class()(text)
        self.faults: list[RecipeFault] = []
        self.num_values = 0
        self.anchors: dict[str, Node | None] = {}  # None while the node is being parsed

    def location_of(self, event: Any) -> SourceLocation:
        return _location(self.start, event.start_mark.line, event.start_mark.column)

    def document(self) -> Node:
        self.loader.get_event()  # the stream starts
        if self.loader.check_event(yaml.StreamEndEvent):
            return Node(None, self.start)
        self.loader.get_event()  # the document starts
        node = self.node(())
        self.loader.get_event()  # the document ends
        if not self.loader.check_event(yaml.StreamEndEvent):
            message = 'a second YAML document begins here; a recipe is only one, remove the "---"'
            self.faults.append(RecipeFault(self.location_of(self.loader.peek_event()), (), message))
        return node

    def node(self, path: KeyPath) -> Node:
        event = self.loader.get_event()
        location = self.location_of(event)
        if len(path) >= MAX_DEPTH:
            raise Unreadable(RecipeFault(location, (), _TOO_DEEP))
        if isinstance(event, yaml.AliasEvent):
            node = self.aliased(str(event.anchor), location, path)
            self.count(node.size, location)
        else:
            self.count(1, location)
            if event.anchor:
                self.anchors[event.anchor] = None
            node = self.written(event, location, path)
            if event.anchor:
                self.anchors[event.anchor] = node
        if len(path) + node.depth > MAX_DEPTH:
            raise Unreadable(RecipeFault(location, (), _TOO_DEEP))
        return node

    def count(self, values: int, location: SourceLocation) -> None:
        self.num_values += values
        if self.num_values > MAX_VALUES:
            raise Unreadable(RecipeFault(location, (), _TOO_MANY))

    def aliased(self, anchor: str, location: SourceLocation, path: KeyPath) -> Node:
        if anchor not in self.anchors:
            message = (
                f'the alias *{shown(anchor)} has no anchor; write "&{shown(anchor)}" before '
                "the value it repeats, or put the text in quotes"
            )
        elif (node := self.anchors[anchor]) is not None:
            return replace(node, location=location)
        else:
            message = f"the alias *{shown(anchor)} refers to a value that contains it; remove it"
        raise Unreadable(RecipeFault(location, path, message))

    def written(self, event: Any, location: SourceLocation, path: KeyPath) -> Node:
        # "!" alone and !!str only mark a value as text, which is fine in a recipe.
        if event.tag not in (None, "!", "tag:yaml.org,2002:str"):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            message = f"the tag {shown(tag)} is not allowed in a recipe; remove it"
            self.faults.append(RecipeFault(location, path, message))
        match event:
            case yaml.ScalarEvent():
                is_plain = event.implicit[0] and event.tag is None
                content = read_plain_scalar(event.value) if is_plain else event.value
                if _LONE_SURROGATE.search(event.value):
                    raise Unreadable(RecipeFault(location, path, _SURROGATE_FAULT))
                return Node(content, location, event.value)
            case yaml.SequenceStartEvent():
                return _container(list(self.items(path)), location)
            case _:
                return _container(self.mapping(path), location)

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
            key = self.node((*path, "?"))  # a nested key is parsed, then refused
            if is_merge:
                self.merge(self.node(path), merged, path)
            elif self.accepts_key(key, own, path):
                value = self.node((*path, str(key.content)))
                own[str(key.content)] = replace(value, key_location=key.location)
            else:
                self.node((*path, "?"))
        self.loader.get_event()
        return {**merged, **own}

    def accepts_key(self, key: Node, own: dict[str, Node], path: KeyPath) -> bool:
        if not isinstance(key.content, str):
            word = shown(key.text)
            message = "a key must be text; write a name"
            if word:
                message = f'the key {word} is not text; put it in quotes: "{word}"'
            self.faults.append(RecipeFault(key.location, path, message))
            return False
        if key.content in own:
            first = own[key.content].key_location
            where = f", first on line {first.line}" if first and first.line else ""
            message = f"this key is given twice{where}; remove one of them"
            self.faults.append(RecipeFault(key.location, (*path, key.content), message))
            return False
        return True

    def merge(self, source: Node, merged: dict[str, Node], path: KeyPath) -> None:
        """Merge the keys of `<<: *name`; the section's own keys and earlier merges win."""
        sources = source.content if isinstance(source.content, list) else [source]
        for section in sources:
            if isinstance(section.content, dict):
                for key, value in section.content.items():
                    merged.setdefault(key, value)
            else:
                message = 'only a section can be merged with "<<"; write "<<: *name"'
                self.faults.append(RecipeFault(source.location, path, message))


def _location(start: SourceLocation, line: int, column: int) -> SourceLocation:
    """The location of PyYAML's line and column, which start at 0."""
    return replace(start, line=line + 1, column=column + 1) if start.line else start


def _is_merge_key(event: Any) -> bool:
    return isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]


def _container(content: list[Node] | dict[str, Node], location: SourceLocation) -> Node:
    children = list(content.values()) if isinstance(content, dict) else content
    return Node(
        content,
        location,
        size=1 + sum(child.size for child in children),
        depth=1 + max((child.depth for child in children), default=0),
    )


# 18 digits always fit in 64 bits; a longer number is a typo and stays text.
_INTEGER = re.compile(r"[-+]?(0|[1-9](_?[0-9]){0,17}|0x[0-9a-fA-F]{1,15})")
FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_NAMED: dict[str, bool | None] = {"": None, "~": None, "null": None} | {
    word: value
    for value, words in ((True, ("true", "yes", "on")), (False, ("false", "no", "off")))
    for word in words
}


def read_plain_scalar(text: str) -> Scalar:
    """The value of an unquoted scalar.

    The rules are those of YAML 1.2, where 1e-4 is a number and 010, 1:30 and 2026-01-01 are text.
    In addition, yes/no/on/off are booleans, as in YAML 1.1, because many people expect them to be.
    """
    word = text.lower() if text in (text.lower(), text.title(), text.upper()) else text
    if word in _NAMED:
        return _NAMED[word]
    if _INTEGER.fullmatch(text):
        return int(text, 0)
    if FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


_ALIGNMENT = (
    "this line is not aligned with the lines above it, or text follows the closing quote of a "
    "value; indent all keys of a section alike"
)
_COLON = (
    '":" is not allowed here; put a value that contains ": " in quotes, and indent all keys of a '
    "section alike"
)
_NAME = '"*" and "&" have a meaning in YAML; put text that begins with one in quotes'


# From the wording of both parsers, C and Python, to our sentence; the first match counts.
_SENTENCES = (
    ("mapping values are not allowed", _COLON),
    ("unexpected ':'", _COLON),
    (
        "mapping keys are not allowed",
        '"? " is not allowed here; put text that begins with it in quotes',
    ),
    (
        "sequence entries are not allowed",
        'a list cannot begin on the line of its key; put each "- " on a new line',
    ),
    ("expected alphabetic or numeric", _NAME),
    (
        "unknown escape",
        "a backslash starts an escape in \"...\"; use '...' for a literal backslash",
    ),
    ("escape", "invalid escape sequence; put the text in '...' instead of \"...\""),
    ("directive", 'a line cannot begin with "%"; remove it'),
    ("incompatible", "unknown YAML version; remove the %YAML line"),
    ("document start", "the recipe has ended above this line; check the indentation"),
    ("document indicator", 'a quote is still open at this "---"; close it'),
    ("tag", 'a word that begins with "!" is a YAML tag; put it in quotes'),
    ("expected key", _ALIGNMENT),
    ("expected <block end>", _ALIGNMENT),
    ("expected '-' indicator", _ALIGNMENT),
    ("node content", "a value is missing here, or a character is not needed; check the line"),
    ("block scalar", 'nothing may follow "|" or ">"; put the text on the next line'),
)


_BRACKET_CONTEXTS = {
    "while parsing a flow sequence": ("[", "]"),
    "while parsing a flow mapping": ("{", "}"),
}
_CONTROL = re.compile(
    "[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]",
)


def _find_control_character(text: str) -> tuple[int, int, str] | None:
    """Line and column, from 0, of the first character that YAML forbids, and a message."""
    found = _CONTROL.search(text)
    if found is None:
        return None
    before = text[: found.start()]
    line = before.count("\n")
    column = len(before) - (before.rfind("\n") + 1)
    code = f"U+{ord(found.group()):04X}"
    return line, column, f"YAML does not allow the invisible character {code}; remove it"


def _explain_syntax_error(error: yaml.MarkedYAMLError, text: str) -> tuple[int, int, str]:
    """Line and column of the mistake, both from 0, and a message that says how to fix it."""
    problem = error.problem or ""
    context = error.context or ""
    mark = error.problem_mark or error.context_mark
    assert mark is not None, "PyYAML marks every syntax error"
    opened = error.context_mark or mark
    # A tab breaks the structure, and the parser may notice only further down.
    tab = _find_tab(text, opened.line, mark.line)
    if tab is not None:
        return tab[0], tab[1], "this line is indented with a tab; use spaces, two per level"
    if "quoted scalar" in context and "end of stream" in problem:
        quote = _character_at(text, opened.line, opened.column)
        return opened.line, opened.column, f"the quote {quote} opened here is never closed"
    if context in _BRACKET_CONTEXTS and "expected ','" in problem:
        opening, closing = _BRACKET_CONTEXTS[context]
        message = f'the "{opening}" opened here has no "{closing}", or a comma is missing; add it'
        return opened.line, opened.column, message
    if "could not find expected ':'" in problem:
        return opened.line, opened.column, 'this line has no ":"; write "key: value"'
    if "cannot start any token" in problem:
        character = _character_at(text, mark.line, mark.column)
        return mark.line, mark.column, f'text cannot begin with "{character}"; put it in quotes'
    for words, sentence in _SENTENCES:
        if words in problem or words in context:
            return mark.line, mark.column, sentence
    return mark.line, mark.column, f"invalid YAML ({problem}); check the line"


def _find_tab(text: str, first_line: int, last_line: int) -> tuple[int, int] | None:
    lines = text.split("\n")
    for number in range(first_line, min(last_line, len(lines) - 1) + 1):
        line = lines[number]
        indent = line[: len(line) - len(line.lstrip(" \t"))]
        if "\t" in indent and line.strip():
            return number, indent.index("\t")
    return None


def _character_at(text: str, line: int, column: int) -> str:
    lines = text.split("\n")
    return lines[line][column : column + 1] if line < len(lines) else ""
