"""Say in plain words what keeps a text from being YAML.

PyYAML's own messages name the parser's states ("did not find expected key"), not the slip.
"""

import re

import yaml

_ALIGNMENT = (
    "this line does not line up with the lines above it, or the value before it goes on after its "
    "closing quote; give keys of one section the same indentation"
)
_COLON = (
    'a ":" cannot stand here; put a value that contains ": " in quotes, and indent keys of one '
    "section alike"
)
_NAME = '"*" and "&" are signs of YAML; put text that begins with one in quotes'

# Words of the parser, in C or in Python, to our sentence; the first that is found counts.
_SENTENCES = (
    ("mapping values are not allowed", _COLON),
    ("unexpected ':'", _COLON),
    ("mapping keys are not allowed", 'a "? " cannot stand here; put text that begins so in quotes'),
    (
        "sequence entries are not allowed",
        'a list cannot begin behind "key:"; put "- " on new lines',
    ),
    ("expected alphabetic or numeric", _NAME),
    ("unknown escape", "a backslash begins an escape in \"...\"; use '...' for a plain backslash"),
    ("escape", "this is no valid escape sequence; put the text in '...' instead of \"...\""),
    ("directive", 'a line cannot begin with "%"; remove it'),
    ("incompatible", "this version of YAML is not known; remove the %YAML line"),
    ("document start", "the recipe ended above, and yet it goes on; indent it alike"),
    ("document indicator", 'a quote is still open at this "---"; close it'),
    ("tag", 'a word that begins with "!" is a tag, which recipes do not have; put it in quotes'),
    ("expected key", _ALIGNMENT),
    ("expected <block end>", _ALIGNMENT),
    ("expected '-' indicator", _ALIGNMENT),
    ("node content", "a value is missing here, or there is a sign too many; see the line"),
    ("block scalar", 'behind "|" or ">" the line must end; put the text into the next line'),
)
_BRACKET_CONTEXTS = {
    "while parsing a flow sequence": ("[", "]"),
    "while parsing a flow mapping": ("{", "}"),
}
_CONTROL = re.compile(
    "[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]",
)


def find_control_character(text: str) -> tuple[int, int, str] | None:
    """Line and column, from 0, of the first character that YAML forbids, and a sentence."""
    found = _CONTROL.search(text)
    if found is None:
        return None
    before = text[: found.start()]
    line = before.count("\n")
    column = len(before) - (before.rfind("\n") + 1)
    code = f"U+{ord(found.group()):04X}"
    return line, column, f"the invisible character {code} cannot stand in YAML; remove it"


def explain_syntax_error(error: yaml.MarkedYAMLError, text: str) -> tuple[int, int, str]:
    """Line and column of the slip, both from 0, and a sentence that says what to do."""
    problem = error.problem or ""
    context = error.context or ""
    mark = error.problem_mark or error.context_mark
    assert mark is not None, "PyYAML marks every syntax error"
    opened = error.context_mark or mark
    # A tab deforms the structure, and the parser may notice only lines below.
    tab = _find_tab(text, opened.line, mark.line)
    if tab is not None:
        return tab[0], tab[1], "a tab indents this line; YAML wants spaces, two for each level"
    if "quoted scalar" in context and "end of stream" in problem:
        quote = _sign_at(text, opened.line, opened.column)
        return opened.line, opened.column, f"the quote {quote} that opens here is never closed"
    if context in _BRACKET_CONTEXTS and "expected ','" in problem:
        opening, closing = _BRACKET_CONTEXTS[context]
        message = (
            f'the "{opening}" that opens here lacks its "{closing}", or a comma is missing in it'
        )
        return opened.line, opened.column, f"{message}; add it"
    if "could not find expected ':'" in problem:
        return opened.line, opened.column, 'this line has no ":"; write "key: value"'
    if "cannot start any token" in problem:
        sign = _sign_at(text, mark.line, mark.column)
        return mark.line, mark.column, f'text cannot begin with "{sign}"; put it in quotes'
    for words, sentence in _SENTENCES:
        if words in problem or words in context:
            return mark.line, mark.column, sentence
    return mark.line, mark.column, f"this is not valid YAML ({problem}); see the line"


def _find_tab(text: str, first_line: int, last_line: int) -> tuple[int, int] | None:
    lines = text.split("\n")
    for number in range(first_line, min(last_line, len(lines) - 1) + 1):
        line = lines[number]
        indent = line[: len(line) - len(line.lstrip(" \t"))]
        if "\t" in indent and line.strip():
            return number, indent.index("\t")
    return None


def _sign_at(text: str, line: int, column: int) -> str:
    lines = text.split("\n")
    return lines[line][column : column + 1] if line < len(lines) else ""
